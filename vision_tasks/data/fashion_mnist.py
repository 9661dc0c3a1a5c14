"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 60,000 + 10,000 grey images of 28 px."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from vision_tasks.data.images import ArrayImages, ImageData, limited, stratified

#: Where Debian's package dataset-fashion-mnist puts it.
DEFAULT_ROOT = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
VALIDATION_SHARE = 1 / 12  # 5,000 images


def load_fashion_mnist(
    root: Path | None, image_size: int, limit: int | None, seed: int
) -> ImageData:
    """
    5,000 of the training images, always the same, are for validation.

    :raises ValueError: if a file is missing or damaged
    """
    folder = _find(root or DEFAULT_ROOT)
    images_NCHW, targets_N = _read(folder, "train")
    train = ArrayImages(images_NCHW, targets_N, image_size)
    rest, held_out = stratified(targets_N, (1 - VALIDATION_SHARE, VALIDATION_SHARE), seed=0)
    test = ArrayImages(*_read(folder, "t10k"), image_size)
    return ImageData(
        limited(Subset(train, rest.tolist()), targets_N[rest], limit, seed),
        Subset(train, held_out.tolist()),
        test,
        len(CLASSES),
        CLASSES,
    )


def _find(root: Path) -> Path:
    """The folder of the four files; torchvision has them two folders deeper."""
    for folder in (root, root / "FashionMNIST" / "raw"):
        if (folder / "train-images-idx3-ubyte.gz").is_file():
            return folder
    raise ValueError(
        f"fashion-mnist is not in {root}: on Debian `apt-get install dataset-fashion-mnist` puts "
        "it where it is looked for; elsewhere give --root with the folder of its four .gz files"
    )


def _read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images_N = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", header=16)
    labels_N = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", header=8)
    if len(images_N) != 784 * len(labels_N):
        raise ValueError(f"fashion-mnist in {folder}: {part} has not one label for each image")
    if labels_N.max() >= len(CLASSES):
        raise ValueError(
            f"{folder / part}-labels-idx1-ubyte.gz has label {labels_N.max()}, allowed: 0..9; "
            "get the file again"
        )
    images_NCHW = torch.from_numpy(images_N.reshape(-1, 1, 28, 28).copy())
    return images_NCHW, torch.from_numpy(labels_N.astype(np.int64))


def _read_idx(file: Path, header: int) -> np.ndarray:
    try:
        content = gzip.decompress(file.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{file} can't be read ({error}); get the file again") from None
    return np.frombuffer(content, np.uint8, offset=header)
