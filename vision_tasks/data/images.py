"""Images of a task as torch data sets: the size they come out at, splits, and what is limited."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset

# Shape letters: N images of a set, C H W image.


class ImageData(NamedTuple):
    """A classification task's images; items are (uint8 (3, H, W), class)."""

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    n_outputs: int
    """Number of classes."""
    names: tuple[str, ...]
    """Of the classes."""


class LandmarkData(NamedTuple):
    """A landmark task's images; items are (uint8 (3, H, W), float32 (P, 2) in 0..1)."""

    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    n_outputs: int
    """Twice the number of points."""
    names: tuple[str, ...]
    """Of the points."""
    eyes: tuple[Sequence[int], Sequence[int]]
    """Indices of the points whose means are the eyes."""


#: A task's images.
Data = ImageData | LandmarkData


class ArrayImages(Dataset[Any]):
    """
    Images in memory at their native size, resized when they are asked for.

    :param images_NCHW: uint8, 1 or 3 channels
    :param targets_N: class of each
    :param image_size: side of the images that come out, in pixels
    """

    def __init__(self, images_NCHW: Tensor, targets_N: Tensor, image_size: int) -> None:
        self._images_NCHW, self.targets, self._size = images_NCHW, targets_N, image_size

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return resize(self._images_NCHW[index], self._size), self.targets[index]


class FileImages(Dataset[Any]):
    """
    Images that are read when they are asked for.

    :param files: of the images
    :param targets_N: class of each
    :param image_size: side of the images that come out, in pixels
    """

    def __init__(self, files: Sequence[Path], targets_N: Tensor, image_size: int) -> None:
        self._files, self.targets, self._size = files, targets_N, image_size

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return resize(read_image(self._files[index]), self._size), self.targets[index]


def read_image(file: Path) -> Tensor:
    """
    An image file as uint8 (3, H, W).

    :raises ValueError: if it is none
    """
    try:
        with Image.open(file) as image:
            pixels_HWC = np.array(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"image {file} can't be read ({reason}); replace or remove it") from None
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def resize(image_CHW: Tensor, size: int) -> Tensor:
    """uint8 (3, size, size): bilinear with antialiasing; grey becomes three equal channels."""
    if tuple(image_CHW.shape[1:]) != (size, size):
        resized = F.interpolate(
            image_CHW[None].float(), (size, size), mode="bilinear", antialias=True
        )
        image_CHW = resized[0].round().clamp(0, 255).to(torch.uint8)
    return image_CHW.expand(3, -1, -1)


def stratified(targets_N: Tensor, shares: Sequence[float], seed: int) -> list[Tensor]:
    """
    Parts of a set, each with its share of each class, in a random but fixed order.

    :param targets_N: classes
    :param shares: of the parts; they sum to 1
    :return: indices of each part, ascending
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in shares]
    bounds = torch.tensor([0.0, *shares]).double().cumsum(0)
    for c in targets_N.unique():
        rows = (targets_N == c).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        ends = (bounds * len(rows)).round().long().tolist()
        for part, start, end in zip(parts, ends[:-1], ends[1:], strict=True):
            part.append(rows[start:end])
    return [torch.cat(part).sort().values for part in parts]


def limited(dataset: Dataset[Any], targets_N: Tensor, limit: int | None, seed: int) -> Dataset[Any]:
    """
    At most ``limit`` of the images, as many of each class as it can be.

    :raises ValueError: if the limit leaves a class without an image
    """
    if limit is None or limit >= len(targets_N):
        return dataset
    n_classes = len(targets_N.unique())
    if limit < n_classes:
        raise ValueError(f"limit is {limit}, but there are {n_classes} classes; raise it")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(targets_N), generator=generator)
    # The first image of each class, then the second of each, and so on.
    turns = torch.zeros(len(order), dtype=torch.long)
    for c in targets_N.unique():
        is_class = targets_N[order] == c
        turns[is_class] = torch.arange(int(is_class.sum()))
    rows = order[turns.argsort(stable=True)][:limit].sort().values
    return Subset(dataset, rows.tolist())


#: Gives a set's images from its folder, its size, the training images at most, and the seed.
Loader = Callable[[Path | None, int, int | None, int], ImageData]
