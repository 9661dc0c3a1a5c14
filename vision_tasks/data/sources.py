"""What a loader of a data set gives, before it is split, limited and resized."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vision_tasks.data.images import Part


class ClassSource(NamedTuple):
    """
    Labelled images as their publisher splits them.

    :param names: of the classes
    :param train: targets int64 (N,)
    :param test: None where no split is official
    :param validation: None where a part of the training images is held out
    """

    names: tuple[str, ...]
    train: Part
    test: Part | None
    validation: Part | None = None


class PointSource(NamedTuple):
    """
    Faces with landmarks as their publisher splits them.

    :param eyes: two lists of points, whose means are the ends of the inter-ocular distance
    :param train: targets float32 (N, P, 2) in 0..1 of the image, x first
    :param test: the same
    :param validation: None where a part of the training images is held out
    """

    eyes: tuple[tuple[int, ...], tuple[int, ...]]
    train: Part
    test: Part
    validation: Part | None = None


def needed_root(root: Path | None, name: str, layout: str) -> Path:
    """
    The folder of a data set that the user has to give.

    :param name: of the data set
    :param layout: what lies in the folder, in words
    :raises ValueError: if it isn't given
    :raises NotADirectoryError: if there is no such folder
    """
    if root is None:
        raise ValueError(f"{name} is not in any package: give --root, a folder with {layout}")
    if not root.is_dir():
        raise NotADirectoryError(f"--root {root} is no folder; {name} needs one with {layout}")
    return root


def needed_file(root: Path, path: str, name: str, layout: str) -> Path:
    """
    A file or folder of a data set.

    :raises FileNotFoundError: if it is missing; the message says what lies in the folder
    """
    file = root / path
    if not file.exists():
        raise FileNotFoundError(f"--root {root} has no {path}; {name} needs a folder with {layout}")
    return file


def read_text(file: Path) -> str:
    """
    What a list or an annotation says.

    :raises ValueError: if it is no text
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error}): replace or convert it") from error


def existing_file(file: Path, where: str) -> Path:
    """
    An image that an annotation names.

    :param where: the annotation is
    :raises FileNotFoundError: if it is missing
    """
    if not file.is_file():
        raise FileNotFoundError(f"{where} names {file}, which is missing: unpack all images")
    return file
