"""Checkpoints of a model: a folder of safetensors files and ``state.json``; nothing is pickled."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor, nn

from hubrl.extractor import HubFeaturesExtractor

STATE_FILE = "state.json"
#: Plain numbers of SB3's models; each model has those that it needs.
NUMBERS = ("num_timesteps", "_episode_num", "_n_updates", "_n_calls", "exploration_rate")


def save_checkpoint(model: BaseAlgorithm, folder: Path, extra: dict[str, Any]) -> None:
    """
    Write weights, optimizers and numbers; the folder is replaced as a whole or not at all.

    :param extra: plain data that ``load_checkpoint`` gives back; it wins over the model's numbers
    """
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    scalars: dict[str, Any] = {}
    for name, part in _parts(model).items():
        tensors, scalars[name] = _pack(part)
        save_file(tensors, temporary / f"{name}.safetensors")
    state = {name: getattr(model, name) for name in NUMBERS if hasattr(model, name)}
    episodes = [[float(e["r"]), int(e["l"]), float(e["t"])] for e in model.ep_info_buffer or ()]
    state |= {"episodes": episodes, "scalars": scalars, "encoders": _encoders(model)} | extra
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=1))
    _replace(temporary, folder)


def load_checkpoint(model: BaseAlgorithm, folder: Path) -> dict[str, Any]:
    """
    Put a checkpoint into a model that was built from the same configuration.

    :return: what ``state.json`` holds
    :raises ValueError: if a file is missing, damaged or of another model, or if the hub's encoders
        are others than when the checkpoint was saved
    """
    state = read_state(folder)
    _check_encoders(state["encoders"], _encoders(model), folder)
    for name, part in _parts(model).items():
        file = folder / f"{name}.safetensors"
        try:
            _unpack(part, load_file(file), state["scalars"][name])
        except (OSError, SafetensorError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"checkpoint file {file} can't be loaded: {reason}") from None
    for name in NUMBERS:
        if name in state:
            setattr(model, name, state[name])
    episodes = [dict(zip("rlt", episode, strict=True)) for episode in state["episodes"]]
    model.ep_info_buffer = deque(episodes, maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    return state


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint; one that was being replaced by a killed process comes back."""
    old = _old(folder)
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    return folder.exists()


def read_state(folder: Path) -> dict[str, Any]:
    """
    The numbers of a checkpoint.

    :raises ValueError: if there is no checkpoint
    """
    has_checkpoint(folder)
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError):
        raise ValueError(f"there is no checkpoint in {folder} (no readable {STATE_FILE})") from None
    return state


def _encoders(model: BaseAlgorithm) -> dict[str, str | None]:
    """A hub's encoders; with the sha256 of those whose weights are in no checkpoint."""
    for module in model.policy.modules():
        if isinstance(module, HubFeaturesExtractor):
            return module.pathway.encoders.shared_sha256()
    return {}


def _check_encoders(
    saved: dict[str, str | None], found: dict[str, str | None], folder: Path
) -> None:
    if list(saved) != list(found):
        raise ValueError(
            f"checkpoint {folder} has the encoders {', '.join(saved) or 'none'}, but the hub has "
            f"{', '.join(found) or 'none'}: give the hub that the agent was trained with"
        )
    for name, sha256 in saved.items():
        if sha256 != found[name]:
            raise ValueError(
                f"checkpoint {folder} was saved with frozen encoder {name!r} of sha256 "
                f"{str(sha256)[:12]}..., but the hub's has {str(found[name])[:12]}...: "
                "put that weight file back, or train anew"
            )


def _parts(model: BaseAlgorithm) -> dict[str, Any]:
    """The modules, optimizers and tensors that make up a model, by SB3's names for them."""
    modules, variables = model._get_torch_save_params()
    parts = {}
    for name in modules + variables:
        part: Any = model
        for attribute in name.split("."):
            part = getattr(part, attribute)
        if part is not None:
            parts[name] = part
    return parts


def _pack(part: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors for safetensors, and what is no tensor for JSON."""
    if isinstance(part, torch.optim.Optimizer):
        values = {
            f"{index}.{key}": value
            for index, state in part.state_dict()["state"].items()
            for key, value in state.items()
        }
    else:
        values = part.state_dict() if isinstance(part, nn.Module) else {"value": part.detach()}
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


def _unpack(part: Any, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    if isinstance(part, torch.optim.Optimizer):
        state: dict[int, dict[str, Any]] = {}
        for path, value in {**tensors, **scalars}.items():
            index, key = path.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
    elif isinstance(part, nn.Module):
        _load_module(part, tensors)
    else:
        part.data.copy_(tensors["value"])


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


def _replace(new: Path, folder: Path) -> None:
    """Rename can't replace a folder that has files, so the old one steps aside first."""
    if has_checkpoint(folder):
        shutil.rmtree(_old(folder), ignore_errors=True)
        os.replace(folder, _old(folder))
    os.replace(new, folder)
    shutil.rmtree(_old(folder), ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
