"""Checkpoints of a model: a folder of safetensors files and ``state.json``, nothing pickled."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired, TypeVar

from stable_baselines3.common.base_class import BaseAlgorithm
from torch import Tensor
from typing_extensions import TypedDict

from agents.run_state import (
    ModelNumbers,
    RestoreEnv,
    RunNumbers,
    RunState,
    model_numbers,
    restore_run_state,
    set_model_numbers,
)
from hubrl.extractor import HubFeaturesExtractor
from hubrl.files import DamagedFileError
from hubrl.finite import Rollbacks
from hubrl.state_folder import StoredCount, load_state, save_state

#: The tensors of ``RunState``; a checkpoint without them is for playing.
RUN = "run"
#: What a file may raise that fits its checksum, but not the run.
UNFIT = (KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError)


class Progress(TypedDict):
    """How far a checkpoint's model was."""

    num_timesteps: StoredCount


class Checkpoint(ModelNumbers):
    """``state.json`` of a model."""

    encoders: dict[str, str | None]
    """Those of its hub; with the sha256 of those whose weights are in no checkpoint."""


class RunCheckpoint(Checkpoint, RunNumbers):
    """``state.json`` of a run that can go on."""

    n_rollbacks: NotRequired[Rollbacks]


class BestCheckpoint(TypedDict):
    """``state.json`` of the best model of a run."""

    mean_return: float


State = TypeVar("State", bound=Checkpoint)


def save_checkpoint(
    model: BaseAlgorithm,
    folder: Path,
    extra: dict[str, Any],
    *,
    run: RunState | None = None,
    files: Iterable[Path] = (),
    keep: int = 2,
) -> None:
    """
    Write weights, optimizers and numbers; the folder is replaced as a whole or not at all.

    :param extra: plain data that ``state.json`` shall hold, too
    :param run: where the run stands, if the checkpoint shall continue it
    :param files: those of a replay buffer
    :param keep: checkpoints that stay, this one included
    :raises NotSavedError: if the disk doesn't take it
    """
    numbers = model_numbers(model) if run is None else run.numbers()
    parts = model_parts(model)
    if run is not None:
        parts[RUN] = run.tensors()
    state = numbers | {"encoders": _encoders(model)} | extra
    save_state(parts, state, folder, files, keep=keep)


def load_checkpoint(model: BaseAlgorithm, folder: Path) -> Checkpoint:
    """
    Put a checkpoint's weights, optimizers and numbers into a model of the same configuration.

    :return: what ``state.json`` holds
    :raises ValueError: if a file is missing, damaged or of another model, or if the hub's encoders
        are others than when the checkpoint was saved
    """
    return _load(model, model_parts(model), folder, Checkpoint)


def continue_run(model: BaseAlgorithm, folder: Path, restore_env: RestoreEnv) -> RunCheckpoint:
    """
    Put a run's checkpoint into its model, so that it goes on as if it had not been stopped.

    Environments that don't replay show where they are instead, which is said on the screen.

    :param model: with environments as those of the run
    :param folder: what ``save_checkpoint`` wrote with ``run``
    :param restore_env: as in ``restore_run_state``
    :return: what ``state.json`` holds
    :raises ValueError: as ``load_checkpoint``
    """
    # Leaving training mode later would begin another rollout, with routing of its own.
    model.policy.set_training_mode(False)
    tensors: dict[str, Tensor] = {}
    state = _load(model, model_parts(model) | {RUN: tensors}, folder, RunCheckpoint)
    try:
        differing = restore_run_state(model, state, tensors, restore_env)
    except UNFIT as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DamagedFileError(
            f"checkpoint {folder} can't be continued ({reason}): it is of another run or damaged; "
            "put it back, or train anew"
        ) from error
    if differing:
        print(
            f"environments {', '.join(map(str, differing))} do not come back to where they were by "
            "their seeds and actions: the run goes on, but not exactly as without the stop",
            file=sys.stderr,
        )
    return state


def model_parts(model: BaseAlgorithm) -> dict[str, Any]:
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


def _load(model: BaseAlgorithm, parts: dict[str, Any], folder: Path, cls: type[State]) -> State:
    def check(state: State) -> None:
        _check_encoders(state["encoders"], _encoders(model), folder)

    state = load_state(parts, folder, cls, check)
    set_model_numbers(model, state)
    return state


def _encoders(model: BaseAlgorithm) -> dict[str, str | None]:
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
