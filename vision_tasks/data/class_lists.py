"""
Labelled images with lists of their own, in their publishers' layouts.

torchvision has loaders of three of them, too. They are read here because torchvision's CIFAR-100 is
pickled, and because its others neither name a wrong line nor give labels without the images; the
tests compare them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vision_tasks.data.images import ImageArray, ImageFiles, Part
from vision_tasks.data.sources import (
    ClassSource,
    existing_file,
    needed_file,
    needed_root,
    read_text,
)

CIFAR_LAYOUT = (
    "train.bin, test.bin and fine_label_names.txt of cifar-100-binary.tar.gz "
    "(the Python version of CIFAR-100 is pickled, and pickles can run code)"
)
#: Of a record: coarse label, fine label, and the image.
CIFAR_SHAPE = (3, 32, 32)
CIFAR_RECORD = 2 + 3 * 32 * 32
CARS_LAYOUT = "cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat"
AIRCRAFT_LAYOUT = (
    "data/ of fgvc-aircraft-2013b (images/, variants.txt, images_variant_train.txt ...)"
)
INDOORS_LAYOUT = "Images/CLASS/*, TrainImages.txt and TestImages.txt"


def load_cifar100(root: Path | None) -> ClassSource:
    """
    CIFAR-100: 50,000 and 10,000 images of 32x32 pixels, in memory.

    Krizhevsky: "Learning Multiple Layers of Features from Tiny Images", 2009.

    :param root: the folder of the binary version, or the one above it
    """
    folder = _inner(needed_root(root, "cifar-100", CIFAR_LAYOUT), "cifar-100-binary")
    find = partial(needed_file, folder, name="cifar-100", layout=CIFAR_LAYOUT)
    names = tuple(line for _, line in _lines(find("fine_label_names.txt")))
    parts = [_read_cifar(find(f"{part}.bin"), len(names)) for part in ("train", "test")]
    return ClassSource(names, *parts)


def load_stanford_cars(root: Path | None) -> ClassSource:
    """
    Stanford Cars: 196 models of cars, 8,144 and 8,041 images.

    Krause, Stark, Deng, Fei-Fei: "3D Object Representations for Fine-Grained Categorization",
    ICCV workshops 2013.

    :param root: torchvision's ``stanford_cars``, or the folder above it
    """
    folder = _inner(needed_root(root, "stanford-cars", CARS_LAYOUT), "stanford_cars")
    find = partial(needed_file, folder, name="stanford-cars", layout=CARS_LAYOUT)
    names = tuple(str(name) for name in _read_mat(find("devkit/cars_meta.mat"), "class_names"))
    train, test = (
        _read_cars(find(annotations), find(images), len(names))
        for annotations, images in (
            ("devkit/cars_train_annos.mat", "cars_train"),
            ("cars_test_annos_withlabels.mat", "cars_test"),
        )
    )
    return ClassSource(names, train, test)


def load_aircraft(root: Path | None) -> ClassSource:
    """
    FGVC Aircraft: 100 variants of aircraft, 3,334, 3,333 and 3,333 images.

    They are for training, validation and test. The line of text at the bottom of each image, 20
    pixels with the photographer's name, is left in, as torchvision leaves it.

    Maji, Kannala, Rahtu, Blaschko, Vedaldi: "Fine-Grained Visual Classification of Aircraft", 2013,
    arXiv 1306.5151.

    :param root: the archive's ``data``, or one of the folders above it, as torchvision has them
    """
    folder = needed_root(root, "fgvc-aircraft", AIRCRAFT_LAYOUT)
    folder = _inner(_inner(folder, "fgvc-aircraft-2013b"), "data")
    find = partial(needed_file, folder, name="fgvc-aircraft", layout=AIRCRAFT_LAYOUT)
    names = tuple(line for _, line in _lines(find("variants.txt")))
    train, validation, test = (
        _read_list(find(f"images_variant_{part}.txt"), find("images"), names, _aircraft_line)
        for part in ("train", "val", "test")
    )
    return ClassSource(names, train, test, validation)


def load_mit_indoors(root: Path | None) -> ClassSource:
    """
    MIT Indoors: 67 kinds of rooms, 5,360 and 1,340 images.

    Quattoni, Torralba: "Recognizing Indoor Scenes", CVPR 2009.
    """
    folder = needed_root(root, "mit-indoors", INDOORS_LAYOUT)
    find = partial(needed_file, folder, name="mit-indoors", layout=INDOORS_LAYOUT)
    images = find("Images")
    names = tuple(sorted(path.name for path in images.iterdir() if path.is_dir()))
    train, test = (
        _read_list(find(list_file), images, names, _indoors_line)
        for list_file in ("TrainImages.txt", "TestImages.txt")
    )
    return ClassSource(names, train, test)


def _inner(folder: Path, name: str) -> Path:
    """The folder of this name inside, if there is one."""
    return folder / name if (folder / name).is_dir() else folder


def _lines(file: Path) -> list[tuple[int, str]]:
    """Number and text of each line that isn't blank."""
    lines = enumerate(read_text(file).splitlines(), 1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def _read_cifar(file: Path, n_classes: int) -> Part:
    data = np.fromfile(file, dtype=np.uint8)
    if not len(data) or len(data) % CIFAR_RECORD:
        raise ValueError(
            f"{file} has no whole number of records of {CIFAR_RECORD} bytes: replace it"
        )
    records = data.reshape(-1, CIFAR_RECORD)
    labels = records[:, 1].astype(np.int64)
    for index in np.flatnonzero(labels >= n_classes):
        _refuse_label(f"{file}: record {index + 1}", labels[index], n_classes)
    images_NCHW = torch.from_numpy(records[:, 2:].reshape(-1, *CIFAR_SHAPE).copy())
    return Part(ImageArray(images_NCHW), torch.from_numpy(labels))


def _read_cars(annotations_file: Path, images: Path, n_classes: int) -> Part:
    records = np.atleast_1d(_read_mat(annotations_file, "annotations"))
    for key in ("class", "fname"):
        if key not in (records.dtype.names or ()):
            raise ValueError(
                f"{annotations_file} has annotations without {key}: needed is {CARS_LAYOUT}"
            )
    files, labels = [], []
    for number, record in enumerate(records, 1):
        where = f"{annotations_file}: record {number}"
        # Classes are counted from one.
        label = int(record["class"]) - 1
        if not 0 <= label < n_classes:
            _refuse_label(where, label + 1, n_classes)
        files.append(existing_file(images / str(record["fname"]), where))
        labels.append(label)
    return Part(ImageFiles(files), torch.tensor(labels))


def _aircraft_line(line: str) -> tuple[str, str]:
    """``IMAGE CLASS``, without the suffix; a class may have spaces."""
    image, _, name = line.partition(" ")
    return f"{image}.jpg", name


def _indoors_line(line: str) -> tuple[str, str]:
    """``CLASS/IMAGE.jpg``."""
    return line, line.partition("/")[0]


def _read_list(
    list_file: Path,
    images: Path,
    names: Sequence[str],
    parse_line: Callable[[str], tuple[str, str]],
) -> Part:
    """``parse_line`` gives the path of an image and the name of its class."""
    labels_of = {name: label for label, name in enumerate(names)}
    files, labels = [], []
    for number, line in _lines(list_file):
        where = f"{list_file}: line {number}"
        path, name = parse_line(line)
        if name not in labels_of:
            raise ValueError(f"{where} is of class {name!r}, which is not one of the {len(names)}")
        files.append(existing_file(images / path, where))
        labels.append(labels_of[name])
    if not files:
        raise ValueError(f"{list_file} names no image: replace it")
    return Part(ImageFiles(files), torch.tensor(labels))


def _read_mat(file: Path, key: str) -> Any:
    from scipy.io import loadmat

    try:
        return loadmat(file, squeeze_me=True)[key]
    except KeyError:
        raise ValueError(f"{file} has no {key}: replace it") from None
    except Exception as error:  # SciPy doesn't say what a damaged file may raise
        raise ValueError(f"{file} can't be read as a MAT file ({error}): replace it") from error


def _refuse_label(where: str, label: int, n_classes: int) -> None:
    raise ValueError(f"{where} has label {label}, but there are {n_classes} classes")
