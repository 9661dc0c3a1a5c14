"""Evaluation plays whole games, repeatably, and leaves the run's random numbers alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_runs import small_config, small_env

from agents.algorithms import build_model
from agents.evaluation import (
    Episodes,
    bootstrap_interval,
    evaluate,
    returns_report,
    returns_text,
)


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_evaluation_follows_from_its_seed(algorithm: str) -> None:
    model, env = build_model(small_config(algorithm), small_env()), small_env(training=False)
    if algorithm == "dqn":
        model.exploration_rate = 0.5

    def play(seed: int, deterministic: bool = False) -> list[float]:
        episodes = evaluate(model, env, 6, deterministic=deterministic, seed=seed)
        assert episodes is not None
        assert episodes.lengths == [8] * 6
        assert all(0 <= score <= 8 for score in episodes.returns)
        return episodes.returns

    assert play(1) == play(1) != play(2)
    assert play(1, deterministic=True) != play(1)


def test_evaluation_leaves_the_runs_random_numbers_alone() -> None:
    model, env = build_model(small_config("dqn"), small_env()), small_env(training=False)
    model.exploration_rate = 1.0

    def draw() -> tuple[float, float, list[int]]:
        model.set_random_seed(0)
        if draw_after_evaluation:
            evaluate(model, env, 2, deterministic=False, seed=5)
        actions = [int(model.action_space.sample()) for _ in range(5)]
        return float(torch.rand(())), float(np.random.rand()), actions

    draw_after_evaluation = False
    expected = draw()
    draw_after_evaluation = True
    assert draw() == expected


def test_an_evaluation_can_be_stopped() -> None:
    model, env = build_model(small_config(), small_env()), small_env(training=False)
    asked: list[int] = []

    def is_stopped() -> bool:
        asked.append(1)
        return len(asked) > 3

    assert evaluate(model, env, 50, deterministic=False, seed=0, is_stopped=is_stopped) is None
    assert len(asked) == 4


def test_bootstrap_interval() -> None:
    assert bootstrap_interval([3.0, 3.0, 3.0]) == (3.0, 3.0, 3.0)
    values = list(np.random.default_rng(0).normal(10.0, 2.0, size=400))
    mean, low, high = bootstrap_interval(values)
    half = 1.96 * np.std(values) / np.sqrt(400)
    assert mean == pytest.approx(np.mean(values))
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)
    assert bootstrap_interval(values) == (mean, low, high)


def test_one_game_has_no_interval() -> None:
    report = returns_report(Episodes([7.0], [40]))
    assert report == {"mean_return": 7.0, "interval_95": None, "returns": [7.0], "lengths": [40]}
    assert returns_text(report) == "1 game: return 7.00 (give more --episodes for an interval)"
    report = returns_report(Episodes([3.0, 3.0], [40, 41]))
    assert report["interval_95"] == [3.0, 3.0]
    assert returns_text(report) == "2 games: mean return 3.00 (95% interval 3.00 to 3.00)"
