"""Data sets of the image tasks, by name: images of one size, split into three parts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import Dataset

from hubrl.specs import closest
from vision_tasks.data import (
    class_folders,
    class_lists,
    emoji,
    fashion_mnist,
    landmark_files,
    synthetic_faces,
)
from vision_tasks.data.images import ImageDataset, Ints, Part
from vision_tasks.data.sources import ClassSource, PointSource
from vision_tasks.data.splits import held_out, limited, three_parts

__all__ = [
    "CLASSIFICATION",
    "LANDMARKS",
    "Data",
    "ImageData",
    "ImageDataset",
    "LandmarkData",
    "load_classification",
    "load_landmarks",
]

Source = TypeVar("Source")

#: Loaders of labelled images by name; each takes the folder of the data, or None.
CLASSIFICATION: Mapping[str, Callable[[Path | None], ClassSource]] = {
    "fashion-mnist": fashion_mnist.load,
    "emoji": emoji.load,
    "cifar-100": class_lists.load_cifar100,
    "stanford-cars": class_lists.load_stanford_cars,
    "fgvc-aircraft": class_lists.load_aircraft,
    "mit-indoors": class_lists.load_mit_indoors,
    "eurosat": class_folders.load_eurosat,
    "coco-70": class_folders.load_coco70,
    "dmlab": class_folders.load_dmlab,
    "folder": class_folders.load_folder,
}
#: The same of faces with landmarks.
LANDMARKS: Mapping[str, Callable[[Path | None], PointSource]] = {
    "synthetic-faces": synthetic_faces.load,
    "300w": landmark_files.load_300w,
    "wflw": landmark_files.load_wflw,
    "cofw": landmark_files.load_cofw,
    "aflw": landmark_files.load_aflw,
}


#: Images that publishers name: for training, for the test, and for validation where there are such.
PUBLISHED: Mapping[str, tuple[int, ...]] = {
    "cifar-100": (50_000, 10_000),
    "stanford-cars": (8_144, 8_041),
    "fgvc-aircraft": (3_334, 3_333, 3_333),
    "mit-indoors": (5_360, 1_340),
    "eurosat": (27_000,),
    "dmlab": (65_550, 22_735, 22_628),
    "300w": (3_148, 689),
    "wflw": (7_500, 2_500),
    "cofw": (1_345, 507),
    "aflw": (20_000, 4_386),
}


class ImageData(NamedTuple):
    """
    Labelled images: uint8 (3, size, size), each with its class, int64.

    :param train: what is learned from
    :param validation: what a model is chosen by; a part of the publisher's training images
    :param test: the publisher's test images
    :param n_outputs: number of classes
    :param names: of the classes
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    n_outputs: int
    names: tuple[str, ...]


class LandmarkData(NamedTuple):
    """
    Faces: uint8 (3, size, size), each with its points, float32 (P, 2) in 0..1, x first.

    :param train: what is learned from
    :param validation: what a model is chosen by
    :param test: the publisher's test images
    :param n_outputs: two for each point
    :param eyes: two lists of points, whose means are the ends of the inter-ocular distance
    """

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    n_outputs: int
    eyes: tuple[tuple[int, ...], tuple[int, ...]]


#: A task's images.
Data = ImageData | LandmarkData


def load_classification(
    name: str, root: Path | None, image_size: int, limit: int | None, seed: int
) -> ImageData:
    """
    A data set of labelled images.

    :param name: a key of ``CLASSIFICATION``
    :param root: the folder of the data; None: where its package puts it
    :param image_size: side of the images, in pixels; other shapes are squeezed
    :param limit: training images at most, as many of each class; None: all
    :param seed: of the draw of the limited images
    :raises ValueError: if there is no such data set, or its files are wrong
    :raises OSError: if files are missing
    """
    source = _loader(name, CLASSIFICATION)(root)
    _compare_counts(name, source)
    classes_N = source.train.targets.numpy()
    if source.validation is None:
        _check_counts(classes_N, source.names, 3 if source.test is None else 2)
    datasets = _datasets(source, classes_N, image_size, limit, seed)
    return ImageData(*datasets, len(source.names), source.names)


def load_landmarks(
    name: str, root: Path | None, image_size: int, limit: int | None, seed: int
) -> LandmarkData:
    """
    A data set of faces with landmarks.

    :param name: a key of ``LANDMARKS``
    :param root: the folder of the data; None: where its package puts it
    :param image_size: side of the images, in pixels
    :param limit: training images at most; None: all
    :param seed: of the draw of the limited images
    :raises ValueError: if there is no such data set, or its files are wrong
    :raises OSError: if files are missing
    """
    source = _loader(name, LANDMARKS)(root)
    _compare_counts(name, source)
    n_images, n_points, _ = source.train.targets.shape
    classes_N = np.zeros(n_images, dtype=np.int64)
    datasets = _datasets(source, classes_N, image_size, limit, seed)
    return LandmarkData(*datasets, 2 * n_points, source.eyes)


def _loader(
    name: str, loaders: Mapping[str, Callable[[Path | None], Source]]
) -> Callable[[Path | None], Source]:
    if name not in loaders:
        raise ValueError(
            f"no data set {name!r}{closest(name, loaders)}; known: {', '.join(loaders)}"
        )
    return loaders[name]


def _compare_counts(name: str, source: ClassSource | PointSource) -> None:
    """Half an archive has scores that compare with nobody's; so may a part that is meant."""
    parts = (source.train, source.test, source.validation)
    found = tuple(len(part.images) for part in parts if part is not None)
    if name in PUBLISHED and found != PUBLISHED[name]:
        now, then = (" + ".join(f"{n:,}" for n in counts) for counts in (found, PUBLISHED[name]))
        print(
            f"{name} has {now} images here and {then} as published: results compare with others' "
            "if all are unpacked",
            file=sys.stderr,
        )


def _datasets(
    source: ClassSource | PointSource,
    classes_N: Ints,
    image_size: int,
    limit: int | None,
    seed: int,
) -> tuple[ImageDataset, ImageDataset, ImageDataset]:
    """Training, validation and test; ``classes_N`` are equal where there are no classes."""
    train = source.train
    validation, test = source.validation or train, source.test or train
    rows, validation_rows, test_rows = map(_all_rows, (train, validation, test))
    if source.test is None:
        rows, validation_rows, test_rows = three_parts(classes_N)
    elif source.validation is None:
        rows, validation_rows = held_out(classes_N)
    if limit is not None:
        rows = rows[limited(classes_N[rows], limit, seed)]
    return (
        ImageDataset(train, rows, image_size),
        ImageDataset(validation, validation_rows, image_size),
        ImageDataset(test, test_rows, image_size),
    )


def _all_rows(part: Part) -> Ints:
    return np.arange(len(part.images))


def _check_counts(classes_N: Ints, names: tuple[str, ...], needed: int) -> None:
    """Training, validation and what is split off as a test each need an image of each class."""
    counts = np.bincount(classes_N, minlength=len(names))
    for index in np.flatnonzero(counts < needed):
        raise ValueError(
            f"class {names[index]!r} has {counts[index]} training image(s), but needs {needed}, "
            "since some are held out: add images or remove the class"
        )
