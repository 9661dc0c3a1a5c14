"""Rendered images, kept in hubrl's cache folder."""

from __future__ import annotations

import os
from collections.abc import Callable

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hubrl.specs import cache_folder


def cached(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """
    The tensors that are kept under a name, made and kept at the first call.

    :param name: which must change with what is made
    :param make: gives the tensors
    :raises ValueError: if the kept file is damaged
    """
    folder = cache_folder() / "data"
    file = folder / f"{name}.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Another process may make the same file at the same time.
        temporary = folder / f".{name}.{os.getpid()}.new"
        save_file(make(), temporary)
        os.replace(temporary, file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): delete it") from error
