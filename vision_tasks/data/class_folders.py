"""Labelled images in a folder for each class: a user's own, EuroSAT, COCO-70's crops, DMLab."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from vision_tasks.data.images import ImageFiles, Part
from vision_tasks.data.sources import ClassSource, needed_root

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff",
            ".webp")  # fmt: skip
PARTS_LAYOUT = "train/CLASS/* and test/CLASS/*, val/CLASS/* if you like"
#: Where there is neither, a part of the training images is held out.
VALIDATION_FOLDERS = ("val", "valid", "validation")
FOLDER_LAYOUT = f"{PARTS_LAYOUT}, or CLASS/* (a fifth of each class is then the test)"
EUROSAT_LAYOUT = "the class folders of EuroSAT's RGB images (AnnualCrop/*.jpg and nine others)"


def load_folder(root: Path | None) -> ClassSource:
    """
    A user's own images: ``train/CLASS/*`` and ``test/CLASS/*``, or ``CLASS/*``.

    Beside the first two, ``val/CLASS/*`` is what a model is chosen by.

    :raises ValueError: if there are no class folders, or one is empty
    """
    folder = needed_root(root, "folder", FOLDER_LAYOUT)
    # One with images in it is a class: trains, say.
    has_parts = [any(p.is_dir() for p in _entries(folder / part)) for part in ("train", "test")]
    if all(has_parts):
        return _load_parts(folder, FOLDER_LAYOUT)
    if any(has_parts):
        raise ValueError(
            f"--root {folder} has train or test, but not both: needed is {FOLDER_LAYOUT}"
        )
    names = class_names(folder, FOLDER_LAYOUT)
    return ClassSource(names, read_part(folder, names), test=None)


def load_eurosat(root: Path | None) -> ClassSource:
    """
    EuroSAT: ten kinds of land cover, 27,000 satellite images of 64x64 pixels; no official split.

    Helber, Bischke, Dengel, Borth: "EuroSAT: A Novel Dataset and Deep Learning Benchmark for Land
    Use and Land Cover Classification", 2019, arXiv 1709.00029.
    """
    folder = needed_root(root, "eurosat", EUROSAT_LAYOUT)
    inner = [folder / path for path in ("eurosat/2750", "2750") if (folder / path).is_dir()]
    folder = inner[0] if inner else folder
    names = class_names(folder, EUROSAT_LAYOUT)
    return ClassSource(names, read_part(folder, names), test=None)


def load_coco70(root: Path | None) -> ClassSource:
    """COCO-70: crops of COCO's objects in 70 classes, which the user cuts out."""
    return _load_parts(needed_root(root, "coco-70", PARTS_LAYOUT), PARTS_LAYOUT)


def load_dmlab(root: Path | None) -> ClassSource:
    """DMLab: frames of a 3D maze in six classes (Zhai et al. 2019, arXiv 1910.04867)."""
    return _load_parts(needed_root(root, "dmlab", PARTS_LAYOUT), PARTS_LAYOUT)


def class_names(folder: Path, layout: str) -> tuple[str, ...]:
    """
    The folders in a folder, in alphabetical order.

    :param layout: what is needed, in words
    :raises ValueError: if there are fewer than two
    """
    names = sorted(path.name for path in _entries(folder) if path.is_dir())
    if len(names) < 2:
        raise ValueError(f"{folder} has {len(names)} class folders: needed is {layout}")
    return tuple(names)


def read_part(folder: Path, names: Sequence[str]) -> Part:
    """
    The images of each class folder, in alphabetical order.

    :raises ValueError: if a class has none, or folders of its own
    """
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        entries = sorted(_entries(folder / name))
        inner = [path for path in entries if path.is_dir()]
        if inner:
            raise ValueError(
                f"{inner[0]} is a folder in a class: move its images up, or make it a class"
            )
        found = [f for f in entries if f.suffix.lower() in SUFFIXES]
        if not found:
            raise ValueError(
                f"{folder / name} has no images ({', '.join(SUFFIXES)}): put some in, or remove "
                "the class"
            )
        files += found
        labels += [label] * len(found)
    return Part(ImageFiles(files), torch.tensor(labels))


def _load_parts(folder: Path, layout: str) -> ClassSource:
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise ValueError(f"--root {folder} has no folder {part}: needed is {layout}")
    names = class_names(folder / "train", layout)
    chosen_by = [name for name in VALIDATION_FOLDERS if (folder / name).is_dir()]
    if len(chosen_by) > 1:
        raise ValueError(f"{folder} has {' and '.join(chosen_by)}: leave one for validation")
    for part in ("test", *chosen_by):
        unknown = sorted(set(class_names(folder / part, layout)) - set(names))
        if unknown:
            raise ValueError(
                f"{folder / part / unknown[0]} is of no class of {folder / 'train'}: remove one "
                "or add the other"
            )
    train, test = (read_part(folder / part, names) for part in ("train", "test"))
    validation = read_part(folder / chosen_by[0], names) if chosen_by else None
    return ClassSource(names, train, test, validation)


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, hidden files left out; nothing if there is no such folder."""
    return [p for p in folder.iterdir() if p.name[0] != "."] if folder.is_dir() else []
