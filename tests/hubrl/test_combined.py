"""Dict observations: images through a hub, vectors beside them, all that the extractor promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file
from sb3_agents import FirstMinibatch, extractors_of, spread_scores
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv

import hubrl
import hubrl.extractor
from hubrl.losses import attach_loss

IMAGE = spaces.Box(0, 255, (4, 36, 36), np.uint8)
VECTOR = spaces.Box(-1.0, 1.0, (3,))


class DictEnv(gym.Env[Any, Any]):
    """Random observations with these keys, in episodes of 10 steps."""

    def __init__(self, keys: dict[str, spaces.Space[Any]], continuous: bool = False) -> None:
        self.observation_space = spaces.Dict(keys)
        self.observation_space.seed(0)
        self.action_space = spaces.Box(-1.0, 1.0, (2,)) if continuous else spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._n = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._n += 1
        return self.observation_space.sample(), 1.0, self._n == 10, False, {}


TWO_IMAGES = {"front": IMAGE, "back": IMAGE, "speed": VECTOR, "gear": spaces.Discrete(5)}


def make(
    algorithm: type[BaseAlgorithm],
    hub: Path,
    keys: dict[str, spaces.Space[Any]] | None = None,
    policy: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **extractor: Any,
) -> BaseAlgorithm:
    env = DictEnv(keys or TWO_IMAGES, continuous=algorithm is SAC)
    kwargs = {"hub": str(hub), "precision": "float32", "features_dim": 32, **extractor}
    return algorithm(
        "MultiInputPolicy",
        DummyVecEnv([lambda: env]),
        seed=0,
        device="cpu",
        policy_kwargs={
            "features_extractor_class": hubrl.HubCombinedExtractor,
            "features_extractor_kwargs": kwargs,
            "net_arch": [],
            **(policy or {}),
        },
        **(settings or {"n_steps": 32, "batch_size": 16, "n_epochs": 2}),
    )


def test_features_are_the_images_then_the_vectors(hub5: Path) -> None:
    space = spaces.Dict(TWO_IMAGES)
    extractor = hubrl.HubCombinedExtractor(space, hub=hub5, features_dim=32, precision="float32")
    assert extractor.features_dim == 32 + 32 + 3 + 5
    extractor.train(False)
    observations = {
        "front": torch.rand(2, 4, 36, 36),
        "back": torch.rand(2, 4, 36, 36),
        "speed": torch.rand(2, 3),
        "gear": torch.nn.functional.one_hot(torch.tensor([1, 4]), 5).float(),
    }
    with torch.no_grad():
        features = extractor(observations)
        # Gymnasium sorts the keys of a Dict.
        expected = [extractor.image_extractors[key](observations[key]) for key in ("back", "front")]
    expected += [observations["gear"], observations["speed"]]  # they come after, by the alphabet
    assert torch.equal(features, torch.cat(expected, dim=1))


@pytest.mark.parametrize("algorithm", [PPO, A2C])
@pytest.mark.parametrize("shared", [True, False])
def test_what_the_extractor_promises_holds(algorithm: Any, shared: bool, hub5: Path) -> None:
    """Weights survive ``ortho_init``, the first ratio is 1 with noise on, each key learns."""
    settings = (
        {"n_steps": 8} if algorithm is A2C else {"n_steps": 32, "batch_size": 16, "n_epochs": 2}
    )
    policy = {"share_features_extractor": shared}
    model = make(algorithm, hub5, policy=policy, settings=settings)
    found = extractors_of(model)
    assert len(found) == (2 if shared else 4)
    for extractor in found:
        for encoder in extractor.pathway.encoders:
            stored = load_file(hub5 / f"{encoder.spec.name}.safetensors")
            for key, tensor in encoder.trunk.state_dict().items():
                assert torch.equal(tensor, stored[key])
    spread_scores(model)
    with torch.no_grad():
        model.policy.action_net.weight.mul_(30)
    first = FirstMinibatch(model)
    before = [e.pathway.generator.scores.weight.clone() for e in found]
    model.learn(32, callback=hubrl.PathwayCallback())
    assert first.errors[0] <= 1e-5
    for weight, extractor in zip(before, found, strict=True):
        assert not torch.equal(weight, extractor.pathway.generator.scores.weight)
    assert {"pathway/usage_a", "pathway/entropy"} <= set(model.logger.name_to_value)


@pytest.mark.parametrize("shared", [True, False])
def test_noise_and_loss_are_where_they_belong(
    shared: bool, hub5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(PPO, hub5, policy={"share_features_extractor": shared})
    noisy: list[bool] = []
    attached: list[int] = []
    route = hubrl.HubPathway.route

    def spy(self: Any, images: Any, noise_BE: Any, *args: Any, **kwargs: Any) -> Any:
        noisy.append(noise_BE is not None)
        return route(self, images, noise_BE, *args, **kwargs)

    monkeypatch.setattr(hubrl.HubPathway, "route", spy)
    monkeypatch.setattr(
        hubrl.extractor, "attach_loss", lambda *args: attached.append(1) or attach_loss(*args)
    )
    model.predict(model.observation_space.sample(), deterministic=False)
    assert not any(noisy)
    assert not attached
    noisy.clear()
    model.learn(32)
    n_minibatches, n_extractors = 2 * model.n_epochs, len(extractors_of(model))
    assert len(attached) == n_minibatches * n_extractors
    # 32 steps and the minibatches; the last value of the rollout is predicted without noise.
    assert sum(noisy) == (32 + n_minibatches) * n_extractors


def test_the_exploration_loss_counts_once_for_each_image(hub5: Path) -> None:
    """Gradient of the attached losses = that of their explicit sum."""
    space = spaces.Dict(TWO_IMAGES)
    torch.manual_seed(0)
    extractor = hubrl.HubCombinedExtractor(
        space, hub=hub5, exploration_coef=0.7, precision="float32"
    )
    observations = {
        "front": torch.rand(6, 4, 36, 36),
        "back": torch.rand(6, 4, 36, 36),
        "speed": torch.rand(6, 3),
        "gear": torch.rand(6, 5),
    }
    parameters = [p for p in extractor.parameters() if p.requires_grad]
    task = extractor(observations).square().mean()
    attached = torch.autograd.grad(task, parameters, materialize_grads=True)
    outputs = [image._learn(observations[key]) for key, image in extractor.image_extractors.items()]
    features = torch.cat([output.features for output in outputs], dim=1)
    vectors = torch.cat([observations["gear"], observations["speed"]], dim=1)
    explicit = torch.cat([features, vectors], dim=1).square().mean()
    explicit = explicit + 0.7 * sum(output.exploration_loss for output in outputs)
    expected = torch.autograd.grad(explicit, parameters, materialize_grads=True)
    for mine, theirs in zip(attached, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("freeze", [(), "all"])
@pytest.mark.parametrize("algorithm", [PPO, SAC])
def test_save_and_load(algorithm: Any, freeze: Any, hub5: Path, tmp_path: Path) -> None:
    replay = {"buffer_size": 64, "learning_starts": 8, "batch_size": 8, "train_freq": 4}
    settings = replay if algorithm is SAC else None
    model = make(algorithm, hub5, settings=settings, freeze=freeze)
    model.learn(32)
    observation = model.observation_space.sample()
    expected, _ = model.predict(observation, deterministic=True)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", device="cpu")
    assert np.array_equal(loaded.predict(observation, deterministic=True)[0], expected)


def test_keys_may_be_named_as_modules_may_not(hub5: Path) -> None:
    make(PPO, hub5, keys={"arm.camera": IMAGE, "values": IMAGE, "type": VECTOR}).learn(32)


def test_each_extractor_logs_its_own(hub5: Path) -> None:
    model = make(PPO, hub5, policy={"share_features_extractor": False})
    callback = hubrl.PathwayCallback()
    model.learn(32, callback=callback)
    names = set(model.logger.name_to_value)
    for place in ("pi/front", "pi/back", "vf/front", "vf/back"):
        assert f"pathway/{place}/usage_a" in names
    assert "pathway/usage_a" in names


def test_images_alone_are_enough(hub5: Path) -> None:
    make(PPO, hub5, keys={"image": IMAGE}).learn(32)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            spaces.Dict({"speed": VECTOR}),
            r"has no image \(a Box of three dimensions\) among its keys speed",
        ),
        (IMAGE, "is a Box, but HubCombinedExtractor takes a Dict: use hubrl"),
        (
            spaces.Dict({"image": spaces.Box(0, 255, (36, 36, 4), np.uint8)}),
            r"observation key 'image' .*\(36, 36, 4\), channels last, .* SB3's VecTransposeImage",
        ),
    ],
)
def test_spaces_that_it_does_not_take(space: Any, message: str, hub5: Path) -> None:
    with pytest.raises(ValueError, match=message):
        hubrl.HubCombinedExtractor(space, hub=hub5)


def test_a_dict_belongs_to_the_combined_extractor(hub5: Path) -> None:
    with pytest.raises(ValueError, match=r"is a Dict, .* use hubrl\.HubCombinedExtractor, with"):
        hubrl.HubFeaturesExtractor(spaces.Dict({"image": IMAGE}), hub=hub5)
