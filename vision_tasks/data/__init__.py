"""Images of the tasks: by name, split, limited and at one size."""

from __future__ import annotations

from pathlib import Path

from hubrl.specs import closest
from vision_tasks.data.emoji import load_emoji
from vision_tasks.data.fashion_mnist import load_fashion_mnist
from vision_tasks.data.images import Data, ImageData, LandmarkData, Loader

__all__ = [
    "CLASSIFICATION",
    "LANDMARKS",
    "Data",
    "ImageData",
    "LandmarkData",
    "load_classification",
    "load_landmarks",
]

#: Data sets of labelled images.
CLASSIFICATION: dict[str, Loader] = {
    "fashion-mnist": load_fashion_mnist,
    "emoji": load_emoji,
}
LANDMARKS: dict[str, Loader] = {}


def load_classification(
    name: str, root: Path | None, image_size: int, limit: int | None, seed: int
) -> ImageData:
    """
    Labelled images. Validation images are held out of the training part by a fixed rule; test
    images are those of the data set.

    :param name: a key of ``CLASSIFICATION``
    :param root: its folder; None: where the package that carries it puts it
    :param image_size: side of the images that come out, in pixels
    :param limit: training images at most, as many of each class; None: all
    :param seed: decides which are left out
    :raises ValueError: if the name is unknown, or the data are missing or damaged
    """
    if name not in CLASSIFICATION:
        raise ValueError(
            f"data is {name!r}{closest(name, CLASSIFICATION)}, allowed: {', '.join(CLASSIFICATION)}"
        )
    return CLASSIFICATION[name](root, image_size, limit, seed)


def load_landmarks(
    name: str, root: Path | None, image_size: int, limit: int | None, seed: int
) -> LandmarkData:
    """As ``load_classification``."""
    raise ValueError(f"data is {name!r}, allowed: {', '.join(LANDMARKS)}")
