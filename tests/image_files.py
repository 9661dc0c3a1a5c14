"""Small image files for the tests of data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def write_image(file: Path, seed: int = 0, size: tuple[int, int] = (20, 16)) -> NDArray[np.uint8]:
    """Random pixels (H, W, 3) in a file; those of a PNG are read back as they are."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return pixels


def write_classes(folder: Path, counts: dict[str, int]) -> None:
    """A folder for each class, with so many images."""
    for label, (name, count) in enumerate(counts.items()):
        for number in range(count):
            write_image(folder / name / f"{number:03}.png", seed=100 * label + number)
