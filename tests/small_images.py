"""Small image tasks for tests: which quadrant is bright, and where its middle is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from small_hubs import nature_spec, write_hub
from torch import Tensor
from torch.utils.data import TensorDataset

from hubrl.signals import StopSignal
from vision_tasks.config import BUILT_IN_CONFIGS, VisionConfig, load_config
from vision_tasks.data import ImageData, LandmarkData

SIZE = 36


def quadrant_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (B, 3, 36, 36) uint8, and which quadrant is bright (B,)."""
    generator = torch.Generator().manual_seed(seed)
    classes_B = torch.randint(0, 4, (n,), generator=generator)
    images_BCHW = torch.randint(0, 60, (n, 3, SIZE, SIZE), generator=generator)
    half = SIZE // 2
    for image_CHW, number in zip(images_BCHW, classes_B.tolist(), strict=True):
        top, left = number // 2 * half, number % 2 * half
        image_CHW[:, top : top + half, left : left + half] += 150
    return images_BCHW.to(torch.uint8), classes_B


def quadrant_data(n: int = 24) -> ImageData:
    """Three sets of them."""
    train, validation, test = (
        TensorDataset(*quadrant_images(size, seed)) for seed, size in enumerate((n, 12, 12))
    )
    return ImageData(train, validation, test, 4, ("a", "b", "c", "d"))


def landmark_data(n: int = 24) -> LandmarkData:
    """The same images; points are the middle of the bright quadrant and two eyes beside it."""
    sets = []
    for seed, size in enumerate((n, 12, 12)):
        images_BCHW, classes_B = quadrant_images(size, seed)
        middles_B2 = torch.stack([classes_B % 2, classes_B // 2], dim=1) / 2 + 0.25
        offsets_P2 = torch.tensor([[0.0, 0.0], [-0.2, 0.0], [0.2, 0.0]])
        sets.append(TensorDataset(images_BCHW, middles_B2[:, None] + offsets_P2))
    return LandmarkData(*sets, n_outputs=6, eyes=((1,), (2,)))


def write_rgb_hub(folder: Path, n: int = 3) -> Path:
    """A hub folder with ``n`` small encoders of RGB images."""
    specs = [dataclasses.replace(nature_spec(name), channels=3) for name in "abcdefgh"[:n]]
    return write_hub(folder, specs)


class StopsAfter(StopSignal):
    """A signal that comes in a given step."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    @property
    def number(self) -> int | None:
        self._left -= 1
        return None if self._left > 0 else 15


def small_vision_config(
    hub: Path, method: str = "hub-pathway", **overrides: object
) -> VisionConfig:
    """Two epochs of three steps on the CPU in float32; keys as ``train__epochs``."""
    values = {
        "method": method,
        "data.image_size": SIZE,
        "data.shift": 0,
        "hub.name": str(hub),
        "hub.precision": "float32",
        "train.epochs": 2,
        "train.batch_size": 8,
        "train.device": "cpu",
    }
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(BUILT_IN_CONFIGS / "classification.yaml", values)
