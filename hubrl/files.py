"""Files that are hashed, read, locked, replaced as a whole; why one can't be read."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor

Data = TypeVar("Data")


class DamagedFileError(ValueError):
    """A file holds something else than it was written with."""


def reason(error: Exception) -> str:
    """What an error says, as much of it as one reads in a line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def is_taken(folder: Path) -> bool:
    """Whether there is something that a new folder of this name would mix with."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def file_sha256(path: Path) -> str:
    """The file's sha256, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """
    Keys and values of a JSON file that may be a stranger's.

    :raises DamagedFileError: if it holds anything else
    """
    try:
        data = json.loads(file.read_text())
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise DamagedFileError(f"{file} is damaged: it must be a JSON mapping of keys to values")
    return data


def checked(data: Any, cls: type[Data], file: Path) -> Data:
    """
    The data's keys that ``cls`` has, their types checked; others are left out.

    :param data: of a JSON file that may be a stranger's
    :param cls: a TypedDict, of ``typing_extensions`` where Python is older than 3.12
    :param file: for the message
    :raises DamagedFileError: if something is missing or something else; one line
    """
    try:
        return pydantic.TypeAdapter(cls).validate_python(data)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        is_missing = first["type"] == "missing"
        what = f"has no {place}" if is_missing else f"has {place} {reprlib.repr(first['input'])}"
        why = "" if is_missing else f" ({first['msg']})"
        raise DamagedFileError(
            f"{file} {what}{why}: put the file back, or do what wrote it again"
        ) from None


def save_tensors(
    tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, or replace it: as a whole or not at all."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.touch()  # with the rights that a new file has here: safetensors hides it from others
    rights = temporary.stat().st_mode
    write_tensors(tensors, temporary, metadata)
    temporary.chmod(rights)
    os.replace(temporary, file)


def write_tensors(
    tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None
) -> None:
    """
    Write a safetensors file of tensors of numpy's types.

    :raises OSError: if the disk doesn't take it
    """
    arrays = {key: t.detach().cpu().contiguous().numpy() for key, t in tensors.items()}
    try:
        # By safetensors.torch, ctypes would keep 6 kB for each length of a tensor ever saved.
        save_file(arrays, file, metadata)
    except SafetensorError as error:
        raise OSError(f"{file} can't be written: {reason(error)}") from error


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """
    Hold the file's lock for the block; other processes and threads wait for it.

    :param file: made if it isn't there; it stays, for a removed one would lock nobody out
    """
    with file.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, named without it."""
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
