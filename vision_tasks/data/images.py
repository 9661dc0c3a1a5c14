"""Images in memory and in files, and data sets of them at one size."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

# Shape letters: N images, C H W image.
Ints = NDArray[np.int64]

#: What makes an image upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Left, top, right and bottom, in pixels; it may reach beyond the image.
Box = tuple[int, int, int, int]


class UnreadableImageError(ValueError):
    """
    A file holds no image that can be used; this is seen when the image's turn comes.

    :param message: one line; of a worker process' report, which ends with such a line, the line
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].rpartition(f"{type(self).__name__}: ")[2])


class Images(Protocol):
    """A sequence of images of any size."""

    def __len__(self) -> int:
        """How many there are."""

    def read(self, index: int) -> Tensor:
        """One image, uint8 (3, H, W) or grey (1, H, W)."""

    def name(self, index: int) -> str:
        """What tells it from the others, wherever they lie."""


class Part(NamedTuple):
    """
    Images with what is to be learned of each.

    :param images: N of them
    :param targets: first axis N
    """

    images: Images
    targets: Tensor


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """
    Some images of a part, all resized to the same square.

    :param part: images and targets
    :param rows: which of them
    :param image_size: side of the images, in pixels
    """

    def __init__(self, part: Part, rows: Ints, image_size: int) -> None:
        self._part, self._rows, self._size = part, rows, image_size

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = int(self._rows[index])
        return resize(self._part.images.read(row), self._size), self._part.targets[row]

    @property
    def targets(self) -> Tensor:
        """Of all images, without reading any."""
        return self._part.targets[torch.from_numpy(self._rows)]

    @property
    def sha256(self) -> str:
        """Of the images' names and targets, in their order, without reading any."""
        names = "\n".join(self._part.images.name(row) for row in self._rows.tolist())
        digest = hashlib.sha256(names.encode(errors="surrogateescape"))
        digest.update(self.targets.numpy().tobytes())
        return digest.hexdigest()


class ImageArray:
    """
    Images in memory.

    :param images_NCHW: uint8, one or three channels
    """

    def __init__(self, images_NCHW: Tensor) -> None:
        self._images_NCHW = images_NCHW

    def __len__(self) -> int:
        return len(self._images_NCHW)

    def read(self, index: int) -> Tensor:
        """One image, uint8 (C, H, W)."""
        return self._images_NCHW[index]

    def name(self, index: int) -> str:
        """Its number."""
        return str(index)


class ImageFiles:
    """
    Images in files, which are read when they are asked for.

    :param files: one for each image
    :param boxes: the part of each image that is wanted; None: all of it
    """

    def __init__(self, files: Sequence[Path], boxes: Sequence[Box] | None = None) -> None:
        self._files, self._boxes = files, boxes

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> Tensor:
        """
        One image, uint8 (3, H, W); black beyond the file's borders.

        A whole image is turned as its EXIF orientation says; boxes are of pixels as they are.

        :raises UnreadableImageError: if the file holds no image, or not a whole one
        """
        if self._boxes is None:
            return to_tensor(read_image(self._files[index], upright=True))
        return to_tensor(read_image(self._files[index]).crop(self._boxes[index]))

    def name(self, index: int) -> str:
        """The file's, and its folder's: that of its class."""
        return "/".join(self._files[index].parts[-2:])


def read_image(file: Path, *, upright: bool = False) -> Image.Image:
    """
    The image in a file, in three colours; what is transparent becomes white.

    :param upright: turned as its EXIF orientation says
    :raises UnreadableImageError: if the file is missing, holds no image or one with more than 8
        bits a colour
    """
    try:
        with Image.open(file) as image:
            # Pillow cuts off the lower byte of colours of 16 bits, which the tiles alone tell.
            if image.mode.startswith(("I", "F")) or ";16" in str(image.tile):
                raise UnreadableImageError(f"{file} has more than 8 bits a colour: convert it to 8")
            picture = _in_colour(image)
            return _turned(picture, image) if upright else picture
    except UnreadableImageError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(
            f"{file} can't be read as an image ({error}): replace it, or remove it and train anew"
        ) from error


def _in_colour(image: Image.Image) -> Image.Image:
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _turned(picture: Image.Image, image: Image.Image) -> Image.Image:
    """
    The picture as ``image``'s orientation says.

    :param image: of which damaged metadata say nothing
    """
    turn = None
    with contextlib.suppress(Exception):  # Pillow doesn't say what reading EXIF may raise
        turn = TURNS.get(image.getexif()[ExifTags.Base.Orientation])
    return picture if turn is None else picture.transpose(turn)


def to_tensor(image: Image.Image) -> Tensor:
    """Uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize(image_CHW: Tensor, size: int) -> Tensor:
    """
    The whole image as a square, uint8 (3, size, size), bilinear with antialiasing.

    :param image_CHW: uint8; grey is repeated to three channels
    """
    image_3HW = image_CHW.expand(3, -1, -1)
    if image_3HW.shape[1:] == (size, size):
        return image_3HW.contiguous()
    resized = F.interpolate(image_3HW[None], (size, size), mode="bilinear", antialias=True)
    return resized[0].contiguous()
