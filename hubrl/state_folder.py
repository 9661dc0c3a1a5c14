"""
A checkpoint: a folder of safetensors files and ``state.json``, replaced as a whole, never pickled.

``manifest.json`` has the sha256 of each file. The checkpoints before are kept beside it as
``NAME.1``, ``NAME.2`` ..., and the newest whole one is read where the last is damaged. Reading
moves nothing, so that a run may be looked at while it trains; its own process puts things right
when it goes on.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hubrl.files import (
    DamagedFileError,
    checked,
    file_sha256,
    read_json,
    reason,
    write_tensors,
)

STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"

#: A module, an optimizer, a tensor, or tensors by name, which are whatever was saved.
StatePart = nn.Module | torch.optim.Optimizer | Tensor | dict[str, Tensor]
#: A number of steps, games or updates, whose file may be a stranger's.
StoredCount = Annotated[int, pydantic.Field(ge=0, le=2**53)]
Numbers = TypeVar("Numbers")
Data = TypeVar("Data")


class NotSavedError(OSError):
    """A checkpoint could not be written, as on a full disk; the one before is whole."""


def save_state(
    parts: Mapping[str, StatePart],
    state: Mapping[str, Any],
    folder: Path,
    files: Iterable[Path] = (),
    *,
    keep: int = 2,
) -> None:
    """
    Write parts and numbers; the folder is replaced as a whole or not at all.

    :param parts: by the names of their files
    :param state: plain data for ``state.json``
    :param files: others that it shall hold; see ``link_file``
    :param keep: checkpoints that stay, this one included, at least 2
    :raises NotSavedError: if the disk doesn't take it
    """
    temporary = folder.with_name(f".{folder.name}.new")
    try:
        _write(parts, state, temporary, files)
        _replace(temporary, folder, keep)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise NotSavedError(
            f"checkpoint {folder} can't be written ({error}); the one before is whole: see to the "
            "disk, then resume"
        ) from error


def load_parts(parts: Mapping[str, StatePart], folder: Path) -> None:
    """
    Put a saved state into parts that were built in the same way.

    :raises DamagedFileError: if a file is missing, damaged or of other parts
    """
    _read(folder, lambda whole: _load(parts, whole))


def load_state(
    parts: Mapping[str, StatePart],
    folder: Path,
    cls: type[Numbers],
    check: Callable[[Numbers], None],
) -> Numbers:
    """
    ``read_state`` and ``load_parts`` of the same checkpoint, should it be replaced meanwhile.

    :param check: raises what forbids to load the parts
    """

    def load(whole: Path) -> Numbers:
        numbers = _numbers(whole, cls)
        check(numbers)
        _load(parts, whole)
        return numbers

    return _read(folder, load)


def optimizer_state(
    optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], values: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    """
    What an optimizer remembers of its weights, by their places.

    :param weights: in the order of their places
    :param values: by place and name, as in ``3.exp_avg``
    :raises KeyError: if they are of another kind of optimizer, or of more weights
    :raises ValueError: if they have other shapes than the weights
    """
    state: dict[int, dict[str, Any]] = {}
    for path, value in values.items():
        index, key = path.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    # torch takes any, and fails in its next step.
    expected = _state_of_one_weight(optimizer)
    for place, found in state.items():
        if not 0 <= place < len(weights):
            raise KeyError(f"it is of {place + 1} weights or more, not of {len(weights)}")
        if found.keys() != expected.keys():
            raise KeyError(f"it has {', '.join(sorted(found))}, not {', '.join(sorted(expected))}")
        for key, like in expected.items():
            shape = weights[place].shape if np.ndim(like) else torch.Size()
            if np.shape(found[key]) != shape or type(found[key]) is not type(like):
                raise ValueError(f"{place}.{key} has another shape than {tuple(shape)}")
            if np.ndim(like):
                # Fused Adam goes through memory without a look at the strides.
                found[key] = torch.empty_like(weights[place]).copy_(found[key])
    return state


def link_file(source: Path, target: Path) -> None:
    """
    Another name for a file that nobody changes in place; a copy where the disk knows no links.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def has_state(folder: Path) -> bool:
    """Whether there is a checkpoint, or one before of which only that is left."""
    return folder.exists() or bool(_older(folder))


def repair_state(folder: Path) -> None:
    """
    Put the newest whole checkpoint in the place of one that is damaged, or that was being replaced
    when its process was killed. Only for the process that writes them.
    """
    if not has_state(folder):
        return
    whole, damage = _newest_whole(folder)
    if whole == folder:
        return
    if damage is not None:
        aside = folder.with_name(f"{folder.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        _say(folder, damage, whole, f"takes its place, and it is kept as {aside.name}")
    os.replace(whole, folder)


def read_state(folder: Path, cls: type[Numbers]) -> Numbers:
    """
    The numbers of a checkpoint, whose files are all compared with its manifest before.

    Of a damaged one those of the one before are read, which is said on the screen.

    :param cls: as in ``checked``: says what they are; others are left out
    :raises DamagedFileError: if there is no checkpoint, or only a damaged one, or if numbers are
        missing or something else
    """
    return _read(folder, lambda whole: _numbers(whole, cls))


def _read(folder: Path, read: Callable[[Path], Data]) -> Data:
    """
    What is read of the newest whole checkpoint: again, if another process replaced it meanwhile.

    :raises DamagedFileError: if there is no whole one, or as ``read`` does
    """
    while True:
        before = _identity(folder)
        try:
            whole, damage = _newest_whole(folder)
            data = read(whole)
        except (DamagedFileError, OSError):
            if _identity(folder) == before:
                raise
            continue
        if _identity(folder) == before:
            if damage is not None:
                _say(folder, damage, whole, "is read")
            return data


def _numbers(folder: Path, cls: type[Numbers]) -> Numbers:
    return checked(_state(folder), cls, folder / STATE_FILE)


def _load(parts: Mapping[str, StatePart], folder: Path) -> None:
    scalars: Any = _state(folder).get("scalars")
    for name, part in parts.items():
        file = folder / f"{name}.safetensors"
        try:
            _unpack(part, load_file(file), scalars[name])
        except (OSError, SafetensorError, RuntimeError, LookupError, TypeError, ValueError) as e:
            raise DamagedFileError(f"checkpoint file {file} can't be loaded: {reason(e)}") from None


def _identity(folder: Path) -> tuple[int, int] | None:
    """Another one for each checkpoint that was ever written there."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _newest_whole(folder: Path) -> tuple[Path, str | None]:
    """
    Where it is, and what is wrong with the one in the folder; None if nothing or it isn't there.

    :raises DamagedFileError: if there is none
    """
    damages: dict[Path, str] = {}
    for checkpoint in filter(Path.exists, (folder, *_older(folder))):
        damage = _damage(checkpoint)
        if damage is None:
            return checkpoint, damages.get(folder)
        damages[checkpoint] = damage
    if not damages:
        raise _no_checkpoint(folder)
    raise DamagedFileError(
        f"checkpoint {folder} is damaged ({next(iter(damages.values()))}), and no whole one is "
        "before it; put the file back, or train anew"
    )


def _say(folder: Path, damage: str, whole: Path, what: str) -> None:
    before = f"the one before, {whole.name}, {what}"
    print(f"checkpoint {folder} is damaged ({damage}): {before}", file=sys.stderr)


def _state(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / STATE_FILE)
    except (OSError, ValueError):
        raise _no_checkpoint(folder) from None


def _no_checkpoint(folder: Path) -> DamagedFileError:
    return DamagedFileError(f"there is no checkpoint in {folder} (no readable {STATE_FILE})")


def _write(
    parts: Mapping[str, StatePart], state: Mapping[str, Any], temporary: Path, files: Iterable[Path]
) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    scalars: dict[str, Any] = {}
    for name, part in parts.items():
        tensors, scalars[name] = _pack(part)
        write_tensors(tensors, temporary / f"{name}.safetensors")
    for file in files:
        link_file(file, temporary / file.name)
    (temporary / STATE_FILE).write_text(json.dumps({**state, "scalars": scalars}, indent=1))
    manifest = {file.name: file_sha256(file) for file in sorted(temporary.iterdir())}
    (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))
    for path in (*temporary.iterdir(), temporary):
        _sync(path)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if they are whole."""
    try:
        manifest = read_json(folder / MANIFEST_FILE)
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, ValueError):
        return f"{MANIFEST_FILE} can't be read"
    for name, sha256 in manifest.items():
        file = folder / name
        if Path(name).name != name:
            return f"{MANIFEST_FILE} names {name!r}, which is no file in it"
        if not file.is_file():
            return f"{name} is missing"
        if file_sha256(file) != sha256:
            return f"{name} has another sha256"
    return None


def _sync(path: Path) -> None:
    """Have the disk hold it before anything points to it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pack(part: StatePart) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors for safetensors, and what is no tensor for JSON."""
    if isinstance(part, torch.optim.Optimizer):
        values = {
            f"{index}.{key}": value
            for index, state in part.state_dict()["state"].items()
            for key, value in state.items()
        }
    elif isinstance(part, nn.Module):
        values = part.state_dict()
    else:
        named = part if isinstance(part, dict) else {"value": part.detach()}
        values = {key: value.clone() for key, value in named.items()}  # none is an alias
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    scalars = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
    # PPO names the shared features extractor three times; safetensors takes no aliases.
    seen: set[tuple[int, torch.Size]] = set()
    unique = {}
    for key, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() == 0 or identity not in seen:
            unique[key] = tensor.contiguous()
        seen.add(identity)
    return unique, scalars


def _unpack(part: StatePart, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    if isinstance(part, torch.optim.Optimizer):
        weights = [weight for group in part.param_groups for weight in group["params"]]
        state = optimizer_state(part, weights, {**tensors, **scalars})
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
    elif isinstance(part, nn.Module):
        _load_module(part, tensors)
    elif isinstance(part, dict):
        part.clear()
        part.update(tensors)
    else:
        part.data.copy_(tensors["value"])


def _state_of_one_weight(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What such an optimizer remembers of a weight of shape (1,)."""
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    alike = copy.copy(optimizer)
    alike.state = defaultdict(dict)
    alike.param_groups = [{**optimizer.param_groups[0], "params": [weight]}]
    alike.step()
    state: dict[str, Any] = alike.state[weight]
    return state


def _load_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Strict, but for aliases: one name of a shared tensor is enough."""
    loaded = {key: value for key, value in module.state_dict().items() if key in tensors}
    addresses = {tensor.data_ptr() for tensor in loaded.values() if tensor.numel()}
    missing = [
        key
        for key, tensor in module.state_dict().items()
        if key not in loaded and tensor.data_ptr() not in addresses
    ]
    if missing:
        raise KeyError(f"no tensor {missing[0]}")
    # Aliases are all in the state dict of the module, so they are left out on purpose.
    result = module.load_state_dict(tensors, strict=False)
    if result.unexpected_keys:
        raise KeyError(f"unknown tensor {result.unexpected_keys[0]}")


def _replace(new: Path, folder: Path, keep: int) -> None:
    """Rename can't replace a folder that has files, so those before step back by one first."""
    older = _older(folder)
    for path in older[keep - 2 :]:
        shutil.rmtree(path)
    for number, path in reversed(list(enumerate(older[: keep - 2], start=2))):
        os.replace(path, folder.with_name(f"{folder.name}.{number}"))
    if folder.exists():
        os.replace(folder, folder.with_name(f"{folder.name}.1"))
    os.replace(new, folder)
    _sync(folder.parent)


def _older(folder: Path) -> list[Path]:
    """The checkpoints before, newest first."""
    names = folder.parent.glob(f"{folder.name}.*")
    numbers = (path.suffix.removeprefix(".") for path in names)
    found = sorted(int(number) for number in numbers if number.isdecimal())
    return [folder.with_name(f"{folder.name}.{number}") for number in found]
