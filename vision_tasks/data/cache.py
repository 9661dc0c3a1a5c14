"""Rendered images, kept in hubrl's cache folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hubrl.files import locked, save_tensors
from hubrl.specs import cache_folder


def cached(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """
    The tensors that are kept under a name, made and kept at the first call.

    :param name: which must change with what is made
    :param make: gives the tensors
    :raises ValueError: if the kept file is damaged
    :raises OSError: if it can't be kept
    """
    folder = cache_folder() / "data"
    file = folder / f"{name}.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f".{name}.lock"):
            if not file.exists():  # another process may have made it in the meantime
                save_tensors(make(), file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it") from error


def key_of(files: Iterable[Path], facts: str) -> str:
    """
    A part of a name that changes with what is made, 12 hex digits.

    :param files: whose content decides it
    :param facts: what else does
    """
    content = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(content + facts.encode()).hexdigest()[:12]
