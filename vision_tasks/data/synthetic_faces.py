"""
Rendered faces with 68 exact landmarks: what runs anywhere, since no package carries annotated ones.

The images are rendered at 128 pixels at the first call, which takes some minutes, and kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vision_tasks.data import face_renderer
from vision_tasks.data.cache import cached, key_of
from vision_tasks.data.face_renderer import render_face
from vision_tasks.data.images import ImageArray, Part
from vision_tasks.data.sources import PointSource

SIZE = 128
N_TRAIN, N_VALIDATION, N_TEST = 3000, 500, 1000


def load(root: Path | None) -> PointSource:
    """
    3,000, 500 and 1,000 faces, in memory.

    :param root: not needed: the mesh ships with hubrl
    :raises ValueError: if it is given
    """
    if root is not None:
        raise ValueError(f"synthetic-faces are rendered and need no --root, but it is {root}")
    counts = [N_TRAIN, N_VALIDATION, N_TEST]
    tensors = cached(f"synthetic-faces-{_key()}", lambda: render_faces(sum(counts)))
    images, points = (torch.split(tensors[name], counts) for name in ("images", "points"))
    train, validation, test = (Part(ImageArray(i), p) for i, p in zip(images, points, strict=True))
    return PointSource(((36,), (45,)), train, test, validation)


def render_faces(n: int) -> dict[str, Tensor]:
    """``images``, uint8 (n, 3, 128, 128), and ``points``, float32 (n, 68, 2)."""
    print(f"rendering {n:,} faces, this once", flush=True)
    indices = tqdm(range(n), "rendering faces", leave=False, disable=not sys.stdout.isatty())
    faces = [render_face(index, SIZE) for index in indices]
    images_N3HW = torch.from_numpy(np.stack([image for image, _ in faces]))
    return {
        "images": images_N3HW,
        "points": torch.from_numpy(np.stack([points for _, points in faces])),
    }


def _key() -> str:
    """It changes with what is rendered."""
    files = [Path(face_renderer.__file__), *sorted(face_renderer.FOLDER.glob("*.[sp]*"))]
    return key_of(files, f"{SIZE} {N_TRAIN} {N_VALIDATION} {N_TEST}")
