"""What goes wrong in a run, found where it begins and told with its remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from agents.checkpoints import model_parts
from agents.config import RunConfig
from hubrl.finite import NotFiniteError, are_finite, first_not_finite

ROLLOUT_ARRAYS = ("observations", "rewards", "values", "log_probs", "advantages", "returns")
#: What torch says on a CPU that has no memory left; on a GPU it has an exception of its own.
NO_MEMORY = ("can't allocate memory", "not enough memory")
#: What torch's distributions say of parameters that are NaN or infinite.
INVALID_ANSWER = ("Expected parameter", "but found invalid values")
MEMORY_FILE = Path("/proc/meminfo")


class OutOfMemoryError(ValueError):
    """Neither model nor buffers fit; says which setting to lower."""


def watch_gradients(model: BaseAlgorithm) -> None:
    """
    From now on a gradient that is not finite raises ``NotFiniteError`` before any weight changes.

    :param model: its optimizers are watched
    """
    parts = model_parts(model)
    weights = {id(weight): name for name, weight in model.policy.named_parameters()}
    weights |= {id(part): name for name, part in parts.items() if isinstance(part, Tensor)}

    def check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = {
            weights.get(id(weight), "a weight"): weight.grad
            for group in optimizer.param_groups
            for weight in group["params"]
            if weight.grad is not None
        }
        if not are_finite(gradients.values()):
            origin = _origin(model, gradients)
            raise NotFiniteError(f"step {model.num_timesteps:,}: {origin}; the update is left out")

    for part in parts.values():
        if isinstance(part, torch.optim.Optimizer):
            part.register_step_pre_hook(check)


def check_weights(model: BaseAlgorithm) -> None:
    """
    :raises NotFiniteError: if a weight is not finite, so that no checkpoint may have it
    """
    bad = _bad_weight(model)
    if bad is not None:
        raise NotFiniteError(f"step {model.num_timesteps:,}: {bad}; no checkpoint is made of it")


@contextlib.contextmanager
def policy_errors(model: BaseAlgorithm) -> Iterator[None]:
    """
    Inside, an answer of the policy that is not finite is a ``NotFiniteError`` in the place of what
    torch says of its distribution.
    """
    try:
        yield
    except ValueError as error:
        if not all(text in str(error) for text in INVALID_ANSWER):
            raise
        origin = _bad_weight(model) or "the policy's answer is not finite"
        raise NotFiniteError(f"step {model.num_timesteps:,}: {origin}") from error


@contextlib.contextmanager
def memory_errors(config: RunConfig) -> Iterator[None]:
    """
    Inside, a lack of memory is an ``OutOfMemoryError`` that names the settings.

    :param config: of the run
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemoryError(_what_to_lower(config)) from error
    except RuntimeError as error:
        if not any(text in str(error) for text in NO_MEMORY):
            raise
        raise OutOfMemoryError(_what_to_lower(config)) from error


def check_memory(config: RunConfig, observations: spaces.Space[Any]) -> None:
    """
    Refuse a replay buffer that is larger than what is free: it would fail hours later, as it fills.

    :param config: of the run
    :param observations: the environments' space
    :raises OutOfMemoryError: if it is
    """
    assert isinstance(observations, spaces.Box)
    n_steps = getattr(config.algorithm, "buffer_size", 0)
    needed, free = 2 * n_steps * observations.low.nbytes, _free_bytes()
    if needed > free:
        raise OutOfMemoryError(
            f"algorithm.buffer_size {n_steps:,} takes {needed / 1e9:,.1f} GB, but "
            f"{free / 1e9:,.1f} GB are free: lower algorithm.buffer_size"
        )


def _origin(model: BaseAlgorithm, gradients: dict[str, Tensor]) -> str:
    """The first thing that is not finite, in the order in which one follows from the other."""
    bad = first_not_finite(_data(model))
    if bad is not None:
        return f"{bad[0]} of the rollout hold {bad[1]}"
    origin = _bad_weight(model)
    if origin is not None:
        return origin
    # Clipping spreads it over all gradients that it scales.
    name, what = first_not_finite(gradients) or ("all weights together", "infinity")
    return f"the gradient of {name} holds {what}"


def _bad_weight(model: BaseAlgorithm) -> str | None:
    bad = first_not_finite(dict(model.policy.named_parameters()))
    return None if bad is None else f"weight {bad[0]} holds {bad[1]}"


def _data(model: BaseAlgorithm) -> dict[str, Tensor]:
    if isinstance(model, OnPolicyAlgorithm):
        arrays = {name: getattr(model.rollout_buffer, name) for name in ROLLOUT_ARRAYS}
    else:
        buffer: Any = model.replay_buffer  # type: ignore[attr-defined]
        arrays = {"rewards": buffer.rewards[: buffer.size()]}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _what_to_lower(config: RunConfig) -> str:
    algorithm = config.algorithm
    keys = [key for key in ("buffer_size", "n_steps", "batch_size") if hasattr(algorithm, key)]
    settings = [f"algorithm.{key} ({getattr(algorithm, key):,})" for key in keys]
    settings.append(f"env.n_envs ({config.env.n_envs})")
    if config.hub.name != "none":
        settings.append(f"hub.top_k ({config.hub.top_k})")
    return f"out of memory: lower {' or '.join(settings)}"


def _free_bytes() -> float:
    """Memory that new arrays can have, without swapping; unknown where there is no /proc."""
    if not MEMORY_FILE.exists():
        return float("inf")
    lines = dict(line.split(":") for line in MEMORY_FILE.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
