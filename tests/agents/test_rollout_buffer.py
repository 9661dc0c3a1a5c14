"""Minibatches that are taken on the device are SB3's."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_runs import small_config, small_env
from stable_baselines3.common.buffers import RolloutBuffer

from agents import algorithms
from agents.algorithms import ALGORITHMS
from agents.rollout_buffer import DeviceRolloutBuffer

IMAGES = spaces.Box(0, 255, (2, 6, 6), np.uint8)


def fill(buffer: RolloutBuffer, seed: int) -> None:
    rng = np.random.default_rng(seed)
    buffer.reset()
    while not buffer.full:
        buffer.add(
            rng.integers(0, 256, (3, *IMAGES.shape), np.uint8),
            np.stack([buffer.action_space.sample() for _ in range(3)]),
            rng.normal(size=3),
            rng.random(3) < 0.5,
            torch.from_numpy(rng.normal(size=3)),
            torch.from_numpy(rng.normal(size=3)),
        )
    buffer.compute_returns_and_advantage(torch.zeros(3), np.zeros(3))


@pytest.mark.parametrize("actions", [spaces.Discrete(4), spaces.Box(-1.0, 1.0, (2,))], ids=repr)
@pytest.mark.parametrize("batch_size", [5, 24, None])
def test_minibatches_are_those_of_sb3(actions: spaces.Space, batch_size: int | None) -> None:
    kinds = (RolloutBuffer, DeviceRolloutBuffer)
    expected, found = (kind(8, IMAGES, actions, "cpu", n_envs=3) for kind in kinds)
    for seed in range(2):  # the second rollout takes the first one's place
        for buffer in (expected, found):
            actions.seed(seed)
            fill(buffer, seed)
        for epoch in range(2):
            minibatches = []
            for buffer in (expected, found):
                np.random.seed(epoch)
                minibatches.append(list(buffer.get(batch_size)))
            for theirs, ours in zip(*minibatches, strict=True):
                for column, other in zip(theirs, ours, strict=True):
                    assert torch.equal(column, other)
                    assert column.dtype == other.dtype


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_run_of_a_gpu_is_built_without_one() -> None:
    config = small_config("ppo", {"train.device": "cuda"})
    with contextlib.closing(small_env()) as env:
        assert algorithms.build_model(config, env).device.type == "cpu"


@pytest.mark.parametrize(
    ("name", "device", "is_ours"),
    [
        ("ppo", "cuda", True),
        ("a2c", "cuda", True),
        ("ppo", "cpu", False),
        ("maskable_ppo", "cuda", False),
        ("recurrent_ppo", "cuda", False),
        ("qrdqn", "cuda", False),
    ],
)
def test_a_gpu_has_it_where_the_algorithm_takes_it(
    name: str, device: str, is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algorithms, "get_device", torch.device)
    kwargs = algorithms._rollout_buffer(
        ALGORITHMS[name], small_config(name, {"train.device": device})
    )
    assert kwargs == ({"rollout_buffer_class": DeviceRolloutBuffer} if is_ours else {})
