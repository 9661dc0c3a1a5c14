"""Evaluation of an agent: whole games, their true returns, and the interval of their mean."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv

from agents.faults import policy_errors

N_RESAMPLES = 10_000


class Episodes(NamedTuple):
    """Whole games, in the order in which they ended."""

    returns: list[float]
    """Unclipped return of each."""
    lengths: list[int]
    """Length of each; of Atari games in emulator frames."""


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def evaluate(
    model: BaseAlgorithm,
    env: VecEnv,
    n_episodes: int,
    *,
    deterministic: bool,
    seed: int,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Episodes | None:
    """
    Play whole games; the model's own random numbers stay as they are.

    :param env: whole games, unclipped rewards
    :param n_episodes: games, shared out evenly among the environments
    :param deterministic: take the best action; otherwise sample as in training
    :param seed: of games and actions
    :param is_stopped: asked at each step; None is returned once it is True
    :raises NotFiniteError: if an answer of its policy is NaN or infinite
    """

    def check(*_: Any) -> None:
        if is_stopped():
            raise _Stopped

    with contextlib.suppress(_Stopped), _own_randomness(model, seed), policy_errors(model):
        env.seed(seed)
        # MaskablePPO plays by the rules that it learned by.
        play: Any = evaluate_masked if isinstance(model, MaskablePPO) else evaluate_policy
        returns, lengths = play(
            model,
            env,
            n_episodes,
            deterministic=deterministic,
            callback=check,
            return_episode_rewards=True,
        )
        assert isinstance(returns, list)
        assert isinstance(lengths, list)
        return Episodes([float(r) for r in returns], [int(n) for n in lengths])
    return None


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """
    Mean with its 95 % percentile bootstrap interval (10,000 resamples, always the same ones).

    :param values: one number for each game or run; at least one
    """
    sample = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(0).integers(len(sample), size=(N_RESAMPLES, len(sample)))
    low, high = np.quantile(sample[chosen].mean(axis=1), [0.025, 0.975])
    return Interval(float(sample.mean()), float(low), float(high))


def returns_report(played: Episodes) -> dict[str, Any]:
    """For JSON: returns, their mean and its 95 % interval, which one game has not."""
    mean, low, high = bootstrap_interval(played.returns)
    return {
        "mean_return": mean,
        "interval_95": [low, high] if len(played.returns) > 1 else None,
        "returns": played.returns,
        "lengths": played.lengths,
    }


def returns_text(report: Mapping[str, Any]) -> str:
    """What ``returns_report`` gave, in one line."""
    n, mean, interval = len(report["returns"]), report["mean_return"], report["interval_95"]
    if interval is None:
        return f"1 game: return {mean:.2f} (give more --episodes for an interval)"
    return (
        f"{n} games: mean return {mean:.2f} (95% interval {interval[0]:.2f} to {interval[1]:.2f})"
    )


class _Stopped(Exception):
    pass


@contextlib.contextmanager
def _own_randomness(model: BaseAlgorithm, seed: int) -> Iterator[None]:
    """Actions follow from the seed, and a run's generators don't notice the evaluation."""
    actions = model.action_space
    numpy_state = np.random.get_state()
    action_state = actions.np_random.bit_generator.state
    devices = [model.device.index or 0] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        np.random.seed(seed)
        actions.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            actions.np_random.bit_generator.state = action_state
