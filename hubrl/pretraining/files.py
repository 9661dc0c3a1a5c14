"""Tensors in files and in dictionaries: replaced as a whole, found by prefix."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(
    tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, or replace it: as a whole or not at all."""
    temporary = file.with_name(f".{file.name}.new")
    save_file({key: t.detach().contiguous() for key, t in tensors.items()}, temporary, metadata)
    os.replace(temporary, file)


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, named without it."""
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
