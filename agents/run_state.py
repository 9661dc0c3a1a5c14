"""Where a run stands between two rollouts: numbers, random states, observations, environments."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, NotRequired, TypeVar

import numpy as np
import torch
from pydantic import Field
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from typing_extensions import TypedDict

from hubrl.state_folder import StoredCount

#: What ``envs.env_state`` and ``envs.restore_env`` are: this room knows no environments.
EnvState = Callable[[VecEnv], Callable[[], dict[str, np.ndarray]]]
RestoreEnv = Callable[[VecEnv, Mapping[str, np.ndarray]], np.ndarray]

#: Plain numbers of SB3's models; each model has those that it needs.
NUMBERS = ("num_timesteps", "_episode_num", "_n_updates", "_n_calls", "exploration_rate")
LSTM_STATES = ("lstm_pi_h", "lstm_pi_c", "lstm_vf_h", "lstm_vf_c")


class ModelNumbers(TypedDict):
    """A model's counters and its last games, in ``state.json``."""

    num_timesteps: StoredCount
    _episode_num: NotRequired[StoredCount]
    _n_updates: NotRequired[StoredCount]
    _n_calls: NotRequired[StoredCount]
    exploration_rate: NotRequired[float]
    episodes: list[tuple[float, int, float]]
    """Return, length and seconds of each."""


class RunNumbers(ModelNumbers):
    """What ``state.json`` knows, in addition, of a run that can go on."""

    numpy_random: tuple[
        Annotated[int, Field(ge=0, le=624)], Annotated[int, Field(ge=0, le=1)], float
    ]
    python_random: tuple[int, float | None]
    action_random: dict[str, Any]


class RunState(NamedTuple):
    """What a run needs beside weights, optimizers and replay buffer to go on exactly."""

    num_timesteps: int
    """Agent steps until then."""
    numbers: Callable[[], dict[str, Any]]
    """Makes plain data, also when the run has gone on by less than a rollout."""
    tensors: Callable[[], dict[str, Tensor]]
    """Makes the rest."""


class _Random(NamedTuple):
    """States of the generators that actions, minibatches and noise follow from."""

    python: Any
    numpy: Any
    actions: Any
    torch: Tensor
    cuda: Tensor | None


def model_numbers(model: BaseAlgorithm) -> dict[str, Any]:
    """A model's counters and its last games."""
    return _counters(model) | _games(model.ep_info_buffer or ())


def set_model_numbers(model: BaseAlgorithm, numbers: ModelNumbers) -> None:
    """The inverse of ``model_numbers``."""
    for name in NUMBERS:
        if name in numbers:
            setattr(model, name, numbers[name])  # type: ignore[literal-required]
    episodes = [dict(zip("rlt", episode, strict=True)) for episode in numbers["episodes"]]
    model.ep_info_buffer = deque(episodes, maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)


def run_state(model: BaseAlgorithm, env_state: EnvState) -> RunState:
    """
    Where a run stands as a rollout starts; quick enough for each of them.

    :param model: on environments that ``env_state`` knows
    :param env_state: gives a function that makes the arrays of where environments stand
    """
    counters, games, generators = (
        _counters(model),
        tuple(model.ep_info_buffer or ()),
        _random(model),
    )
    observed, environments = _observed(model), env_state(_env(model))

    def tensors() -> dict[str, Tensor]:
        arrays = environments().items()
        return (
            observed
            | _random_tensors(generators)
            | {f"env.{key}": torch.from_numpy(array) for key, array in arrays}
        )

    def numbers() -> dict[str, Any]:
        return counters | _games(games) | _random_numbers(generators)

    return RunState(model.num_timesteps, numbers, tensors)


def restore_run_state(
    model: BaseAlgorithm,
    numbers: RunNumbers,
    tensors: Mapping[str, Tensor],
    restore_env: RestoreEnv,
) -> list[int]:
    """
    Lead a model and its environments to where others stood.

    :param numbers: of ``RunState``
    :param tensors: of ``RunState``
    :param restore_env: leads environments to where arrays say, and gives their observations
    :return: places of the environments that show something else than before: they don't replay
    :raises ValueError: if numbers or tensors are of other environments or of another model; or what
        torch and numpy raise at them
    """
    set_model_numbers(model, numbers)
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    environments = {
        key.removeprefix("env."): array for key, array in arrays.items() if key.startswith("env.")
    }
    observations = restore_env(_env(model), environments)
    model._last_obs = observations
    if isinstance(model, OnPolicyAlgorithm):
        model._last_episode_starts = _shaped(arrays["episode_starts"], (model.n_envs,))
    if isinstance(model, RecurrentPPO):
        last: Any = model._last_lstm_states
        states = zip(LSTM_STATES, (*last.pi, *last.vf), strict=True)
        pi_h, pi_c, vf_h, vf_c = (
            _shaped(tensors[name], like.shape).to(model.device) for name, like in states
        )
        model._last_lstm_states = RNNStates((pi_h, pi_c), (vf_h, vf_c))  # type: ignore[assignment]
    _restore_random(model, numbers, tensors)
    pairs = zip(observations, arrays["last_obs"], strict=True)
    return [i for i, (found, before) in enumerate(pairs) if not np.array_equal(found, before)]


Values = TypeVar("Values", np.ndarray, Tensor)


def _shaped(values: Values, shape: Sequence[int]) -> Values:
    """
    :raises ValueError: if they have another shape
    """
    if tuple(values.shape) != tuple(shape):
        raise ValueError(f"an array has shape {tuple(values.shape)} instead of {tuple(shape)}")
    return values


def _env(model: BaseAlgorithm) -> VecEnv:
    env = model.get_env()
    assert env is not None
    return env


def _observed(model: BaseAlgorithm) -> dict[str, Tensor]:
    """What the model saw last."""
    observations = model._last_obs
    assert isinstance(observations, np.ndarray)
    tensors = {"last_obs": torch.from_numpy(observations)}
    if isinstance(model, OnPolicyAlgorithm):
        tensors["episode_starts"] = torch.from_numpy(np.asarray(model._last_episode_starts))
    if isinstance(model, RecurrentPPO):
        last: Any = model._last_lstm_states
        states = (*last.pi, *last.vf)
        tensors |= dict(zip(LSTM_STATES, states, strict=True))
    return tensors


def _counters(model: BaseAlgorithm) -> dict[str, Any]:
    return {name: getattr(model, name) for name in NUMBERS if hasattr(model, name)}


def _games(games: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {"episodes": [[float(game["r"]), int(game["l"]), float(game["t"])] for game in games]}


def _random(model: BaseAlgorithm) -> _Random:
    is_cuda = model.device.type == "cuda"
    return _Random(
        random.getstate(),
        np.random.get_state(legacy=True),
        model.action_space.np_random.bit_generator.state,
        torch.get_rng_state(),
        torch.cuda.get_rng_state(model.device) if is_cuda else None,
    )


def _random_tensors(generators: _Random) -> dict[str, Tensor]:
    tensors = {
        "torch_random": generators.torch,
        "numpy_random": torch.from_numpy(np.asarray(generators.numpy[1]).astype(np.int64)),
        "python_random": torch.tensor(generators.python[1]),
    }
    return tensors if generators.cuda is None else {**tensors, "cuda_random": generators.cuda}


def _random_numbers(generators: _Random) -> dict[str, Any]:
    version, _, python_gauss = generators.python
    return {
        "numpy_random": list(generators.numpy[2:]),
        "python_random": [version, python_gauss],
        "action_random": generators.actions,
    }


def _restore_random(
    model: BaseAlgorithm, numbers: RunNumbers, tensors: Mapping[str, Tensor]
) -> None:
    keys = tensors["numpy_random"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *numbers["numpy_random"]))
    version, gauss = numbers["python_random"]
    random.setstate((version, tuple(tensors["python_random"].tolist()), gauss))
    model.action_space.np_random.bit_generator.state = numbers["action_random"]
    torch.set_rng_state(tensors["torch_random"])
    if "cuda_random" in tensors:
        torch.cuda.set_rng_state(tensors["cuda_random"], model.device)
