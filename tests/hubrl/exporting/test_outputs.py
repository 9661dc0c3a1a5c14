"""Outputs of policies and their graphs against SB3's ``predict``, for each kind of agent."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import QRDQN, TQC, CrossQ, MaskablePPO, RecurrentPPO
from small_hubs import nature_spec, write_hub
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from hubrl.exporting.graph import (
    ActingGraph,
    acts_of_graph,
    acts_of_policy,
    import_onnx,
    write_graph,
)
from hubrl.exporting.outputs import check_policy, outputs
from hubrl.extractor import HubFeaturesExtractor

BOX = spaces.Box(np.array([-2.0, -0.5], np.float32), np.array([1.0, 0.5], np.float32))
DISCRETE = spaces.Discrete(4)
AGENTS: dict[str, tuple[type[BaseAlgorithm], spaces.Space[Any]]] = {
    "ppo": (PPO, DISCRETE),
    "ppo-box": (PPO, BOX),
    "a2c-multi-discrete": (A2C, spaces.MultiDiscrete([3, 2])),
    "a2c-multi-binary": (A2C, spaces.MultiBinary(3)),
    "maskable_ppo": (MaskablePPO, DISCRETE),
    "dqn": (DQN, DISCRETE),
    "qrdqn": (QRDQN, DISCRETE),
    "sac": (SAC, BOX),
    "td3": (TD3, BOX),
    "ddpg": (DDPG, BOX),
    "tqc": (TQC, BOX),
    "crossq": (CrossQ, BOX),
}
#: CrossQ has no policy for images, but an extractor makes it one.
POLICIES = {RecurrentPPO: "CnnLstmPolicy", CrossQ: "MlpPolicy"}


class Images(gym.Env[np.ndarray, Any]):
    """Images to act on by the actions of any space."""

    observation_space = spaces.Box(0, 255, (4, 36, 36), np.uint8)

    def __init__(self, action_space: spaces.Space[Any]) -> None:
        self.action_space = action_space


def agent(name: str, hub: Path, **extractor: Any) -> BaseAlgorithm:
    """An untrained agent of SB3's own policies."""
    algorithm, space = AGENTS.get(name) or (RecurrentPPO, DISCRETE)
    small = {"buffer_size": 10} if issubclass(algorithm, OffPolicyAlgorithm) else {}
    kwargs = {"hub": hub, "precision": "float32", "top_k": 2, "always_active": (), **extractor}
    model: BaseAlgorithm = algorithm(
        POLICIES.get(algorithm, "CnnPolicy"),
        Images(space),
        seed=0,
        policy_kwargs={
            "features_extractor_class": HubFeaturesExtractor,
            "features_extractor_kwargs": kwargs,
            "net_arch": [],
        },
        **small,
    )
    with torch.no_grad():  # heads start so quiet that all images get one action
        for parameter in model.policy.parameters():
            if parameter.ndim == 2 and len(parameter) <= 5:
                parameter.normal_()
    return model


@pytest.fixture
def hub3(tmp_path: Path) -> Path:
    return write_hub(tmp_path / "hub3", [nature_spec(name) for name in "abc"])


def random_images(n: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(n, 4, 36, 36), dtype=np.uint8)


@pytest.mark.parametrize("name", AGENTS)
def test_actions_are_those_of_predict(name: str, hub3: Path) -> None:
    model = agent(name, hub3)
    images = random_images()
    expected = model.predict(images, deterministic=True)[0]
    assert len(np.unique(expected, axis=0)) > 1
    with torch.no_grad():
        ours = outputs(model.policy, torch.from_numpy(images))
        graph_actions, graph_scores = ActingGraph(model.policy)(torch.from_numpy(images))
    np.testing.assert_allclose(ours.actions, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(graph_actions, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(graph_scores, ours.scores, rtol=1e-4, atol=1e-4)
    assert ours.values is None or len(ours.values) == len(images)


@pytest.mark.parametrize(
    "extractor",
    [
        {"aggregation": "concat"},
        {"top_k": 1},
        {"top_k": 3, "generator": "uniform"},
        {"always_active": ["b"], "freeze": ["a", "b"]},
        {"freeze": "all"},
    ],
    ids=str,
)
def test_a_dense_hub_gives_the_numbers_of_dispatch(hub3: Path, extractor: dict[str, Any]) -> None:
    check_dense(agent("ppo", hub3, **extractor))


def test_a_dense_hub_of_many_sizes(mixed_hub: Path) -> None:
    check_dense(agent("dqn", mixed_hub, top_k=3))


def check_dense(model: BaseAlgorithm) -> None:
    images = torch.from_numpy(random_images())
    model.policy.set_training_mode(False)
    with torch.no_grad():
        scores = outputs(model.policy, images).scores
        torch.testing.assert_close(ActingGraph(model.policy)(images)[1], scores)


def test_the_policy_itself_stays_as_it_is(hub3: Path) -> None:
    model = agent("ppo", hub3)
    ActingGraph(model.policy)
    extractor = model.policy.features_extractor
    assert isinstance(extractor, HubFeaturesExtractor)
    assert model.policy.vf_features_extractor is extractor


def test_recurrent_agents_are_refused(hub3: Path) -> None:
    model = agent("recurrent_ppo", hub3)
    with pytest.raises(ValueError, match="a recurrent agent can't be exported: its actions follow"):
        check_policy(model.policy)


def test_a_missing_package_comes_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"ONNX needs onnxscript: pip install 'hubrl\[export\]'"):
        import_onnx()


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_graphs_of_all_kinds_of_agents(name: str, hub3: Path, tmp_path: Path) -> None:
    model = agent(name, hub3)
    images = random_images(1000)
    write_graph(model.policy, tmp_path / "agent.onnx")
    ours = acts_of_graph(tmp_path / "agent.onnx", images)
    theirs = acts_of_policy(model.policy, images)
    np.testing.assert_allclose(ours.actions, theirs.actions, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-4, atol=1e-4)
