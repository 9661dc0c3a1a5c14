"""Checkpoints of a model: a folder of safetensors files and ``state.json``, nothing pickled."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm

from hubrl.extractor import HubFeaturesExtractor
from hubrl.state_folder import load_parts, read_state, save_state

#: Plain numbers of SB3's models; each model has those that it needs.
NUMBERS = ("num_timesteps", "_episode_num", "_n_updates", "_n_calls", "exploration_rate")


def save_checkpoint(model: BaseAlgorithm, folder: Path, extra: dict[str, Any]) -> None:
    """
    Write weights, optimizers and numbers; the folder is replaced as a whole or not at all.

    :param extra: plain data that ``load_checkpoint`` gives back; it wins over the model's numbers
    """
    state = {name: getattr(model, name) for name in NUMBERS if hasattr(model, name)}
    episodes = [[float(e["r"]), int(e["l"]), float(e["t"])] for e in model.ep_info_buffer or ()]
    state |= {"episodes": episodes, "encoders": _encoders(model)} | extra
    save_state(_parts(model), state, folder)


def load_checkpoint(model: BaseAlgorithm, folder: Path) -> dict[str, Any]:
    """
    Put a checkpoint into a model that was built from the same configuration.

    :return: what ``state.json`` holds
    :raises ValueError: if a file is missing, damaged or of another model, or if the hub's encoders
        are others than when the checkpoint was saved
    """
    state = read_state(folder)
    _check_encoders(state["encoders"], _encoders(model), folder)
    load_parts(_parts(model), folder)
    for name in NUMBERS:
        if name in state:
            setattr(model, name, state[name])
    episodes = [dict(zip("rlt", episode, strict=True)) for episode in state["episodes"]]
    model.ep_info_buffer = deque(episodes, maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
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
