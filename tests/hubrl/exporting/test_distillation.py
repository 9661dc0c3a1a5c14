"""Losses of a student, by hand; its memory; what it learns for each kind of agent."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_runs import small_config

from agents.algorithms import build_model
from hubrl.exporting import distillation
from hubrl.exporting.distillation import Distillation, Memory, accuracy, loss_scales, losses
from hubrl.exporting.outputs import Outputs
from hubrl.exporting.play import Games
from hubrl.games import make_env


def policy(space: spaces.Space[Any]) -> Any:
    return SimpleNamespace(action_space=space)


def answer(scores: list[list[float]], actions: list[Any], values: list[list[float]]) -> Outputs:
    return Outputs(torch.tensor(actions), torch.tensor(scores), torch.tensor(values))


def test_losses_of_discrete_actions() -> None:
    teacher = answer([[math.log(3.0), 0.0], [0.0, 0.0]], [0, 0], [[1.0], [2.0]])
    student = answer([[0.0, 0.0], [0.0, 0.0]], [1, 0], [[0.0], [0.0]])
    found = losses(policy(spaces.Discrete(2)), student, teacher)
    # KL of (3/4, 1/4) from (1/2, 1/2), and nothing for the second row.
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(found["kl"]) == pytest.approx(kl / 2)
    assert float(found["values"]) == pytest.approx(2.5)
    shares = accuracy(policy(spaces.Discrete(2)), student, teacher)
    assert float(shares["accuracy"]) == pytest.approx(0.5)


def test_the_divergence_of_q_values_has_no_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "has_action_values", lambda policy: True)
    space = policy(spaces.Discrete(2))

    def kl(size: float) -> float:
        teacher = answer([[size, 0.0], [0.0, size]], [0, 1], [[0.0], [0.0]])
        student = answer([[size, 0.0], [0.0, 0.1 * size]], [0, 1], [[0.0], [0.0]])
        assert float(losses(space, teacher, teacher)["kl"]) == pytest.approx(0.0, abs=1e-6)
        return float(losses(space, student, teacher)["kl"])

    assert 0.0 < kl(1.0) == pytest.approx(kl(100.0), rel=1e-3)


def test_the_divergences_of_an_actions_parts_add_up() -> None:
    teacher = answer([[math.log(3.0), 0.0] * 2], [[0, 0]], [[0.0]])
    student = answer([[0.0] * 4], [[0, 1]], [[0.0]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    space = spaces.MultiDiscrete([2, 2])
    assert float(losses(policy(space), student, teacher)["kl"]) == pytest.approx(2 * kl)
    assert float(accuracy(policy(space), student, teacher)["accuracy"]) == 0.0
    binary = answer([[math.log(3.0)] * 3], [[1.0] * 3], [[0.0]])
    zero = answer([[0.0] * 3], [[0.0] * 3], [[0.0]])
    found = losses(policy(spaces.MultiBinary(3)), zero, binary)
    assert float(found["kl"]) == pytest.approx(3 * kl)


def test_losses_of_continuous_actions() -> None:
    box = policy(spaces.Box(-1.0, 1.0, (2,)))
    teacher, student = (answer([[x, 0.0]], [[x, 0.0]], [[x]]) for x in (1.0, -1.0))
    found = losses(box, student, teacher)
    assert {name: float(value) for name, value in found.items()} == {
        "mean_action": 2.0,
        "values": 4.0,
    }
    assert accuracy(box, student, teacher) == {}


def test_losses_count_as_shares_of_those_of_the_mean_answer() -> None:
    box = policy(spaces.Box(-1.0, 1.0, (1,)))
    teacher = answer([[0.0], [2.0]], [[0.0], [1.0]], [[10.0], [10.0]])
    scales = loss_scales(box, teacher)
    assert float(scales["mean_action"]) == pytest.approx(1.0)
    assert float(scales["values"]) == pytest.approx(1.0)  # a hundredth of 100


def test_memory_keeps_the_last_observations() -> None:
    memory = Memory(6)
    for first in (0, 4, 8):
        images = np.arange(first, first + 4, dtype=np.uint8).reshape(4, 1, 1, 1)
        numbers = torch.from_numpy(images).flatten()
        memory.add(images, Outputs(numbers.long(), numbers[:, None].float(), None))
    images, labels = memory.sample(np.random.default_rng(0), 200, torch.device("cpu"))
    assert set(images.flatten().tolist()) == set(range(6, 12))
    assert (labels.actions == images.flatten()).all()
    assert (labels.scores[:, 0] == images.flatten()).all()
    assert labels.values is None


@pytest.mark.parametrize(
    ("algorithm", "loss", "overrides"),
    [
        ("a2c", "mean_action", {"env.id": "hubrl/TinyImageContinuous-v0"}),
        pytest.param("dqn", "kl", {}, marks=pytest.mark.slow),
        pytest.param("qrdqn", "kl", {}, marks=pytest.mark.slow),
    ],
)
def test_a_student_learns(
    hub5: Path,
    algorithm: str,
    loss: str,
    overrides: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distillation, "BATCH", 32)
    config = small_config(algorithm, {"hub.name": str(hub5), "train.seed": 3, **overrides})
    teacher = build_model(config, make_env(config, 2))
    with torch.no_grad():
        for parameter in teacher.policy.parameters():
            if parameter.ndim == 2 and len(parameter) <= 200:
                parameter.mul_(30.0)  # so far it has no opinion
    alone = small_config(algorithm, {"train.seed": 3, **overrides})
    student = build_model(alone, make_env(alone, 2))
    views: Any = [teacher.get_env(), student.get_env()]
    rows = list(Distillation(teacher, student, Games(views, seed=0), 256).run())
    assert [row["frames"] for row in rows] == [32 * (i + 1) for i in range(8)]
    assert rows[-1][loss] < 0.6 * rows[0][loss]
    assert rows[-1]["values"] < rows[0]["values"]
