"""
Fashion-MNIST: ten kinds of clothes, 60,000 and 10,000 grey images of 28x28 pixels.

Xiao, Rasul, Vollgraf: "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", 2017, arXiv 1708.07747. The files are those of Debian's package, which torchvision
expects in ``FashionMNIST/raw`` below its root, with or without ``.gz``.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vision_tasks.data.images import ImageArray, Part
from vision_tasks.data.sources import ClassSource

NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
#: Magic numbers of IDX files: unsigned bytes in three dimensions and in one.
IMAGES_MAGIC, LABELS_MAGIC = 0x803, 0x801


def load(root: Path | None) -> ClassSource:
    """
    Both parts, in memory.

    :param root: the four files' folder, or torchvision's; None: that of Debian's package
    :raises ValueError: if a file is not what its name says
    :raises FileNotFoundError: if a file is missing
    """
    folder = root or DEBIAN_FOLDER
    return ClassSource(NAMES, train=_part(folder, "train"), test=_part(folder, "t10k"))


def _part(folder: Path, name: str) -> Part:
    images_file = _find(folder, f"{name}-images-idx3-ubyte")
    labels_file = _find(folder, f"{name}-labels-idx1-ubyte")
    images_NHW = _read_idx(images_file, IMAGES_MAGIC)
    labels_N = _read_idx(labels_file, LABELS_MAGIC)
    if len(images_NHW) != len(labels_N):
        raise ValueError(f"{labels_file} has {len(labels_N)} labels for {len(images_NHW)} images")
    wrong = np.flatnonzero(labels_N >= len(NAMES))
    if len(wrong):
        raise ValueError(
            f"{labels_file}: label {wrong[0] + 1} is {labels_N[wrong[0]]}, but the classes are "
            "0 to 9: replace the file"
        )
    images = ImageArray(torch.from_numpy(images_NHW[:, None]))
    return Part(images, torch.from_numpy(labels_N.astype(np.int64)))


def _find(folder: Path, name: str) -> Path:
    for parent in (folder, folder / "FashionMNIST" / "raw"):
        for file in (parent / name, parent / f"{name}.gz"):
            if file.is_file():
                return file
    raise FileNotFoundError(
        f"{folder} has no {name}.gz: `apt-get install dataset-fashion-mnist`, or give --root, a "
        "folder with the four files"
    )


def _read_idx(file: Path, magic: int) -> NDArray[np.uint8]:
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} can't be unpacked ({error}): replace it") from error
    n_axes = magic & 0xFF
    header = [int.from_bytes(data[i : i + 4], "big") for i in range(0, 4 * n_axes + 4, 4)]
    values = np.frombuffer(data[4 * n_axes + 4 :], dtype=np.uint8)
    if header[0] != magic or len(values) != math.prod(header[1:]):
        raise ValueError(f"{file} is no whole IDX file of {n_axes} axes: replace it")
    return values.reshape(header[1:]).copy()
