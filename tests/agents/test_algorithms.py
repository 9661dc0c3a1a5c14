"""Every algorithm is built, learns, and gets its observations and its weights as it should."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import QRDQN
from small_runs import small_config, small_env
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.torch_layers import NatureCNN
from torch import nn

from agents.algorithms import ALGORITHMS, build_model, resolve
from agents.config import algorithm_names
from agents.policies import BaselineCNN, RawImages
from envs import make_vec_env
from hubrl.aggregation import Standardised, Sum
from hubrl.callback import PathwayCallback
from hubrl.extractor import HubFeaturesExtractor
from hubrl.pathway import HubPathway
from hubrl.specs import load_hub, save_hub

ALGOS = list(ALGORITHMS)
CONTINUOUS = ("sac", "td3", "ddpg", "tqc", "crossq")
#: Extractors that a model builds: actors, critics and their targets; 1 where it isn't said.
N_EXTRACTORS = {"dqn": 2, "qrdqn": 2, "sac": 3, "tqc": 3, "td3": 4, "ddpg": 4, "crossq": 2}


def build(algorithm: str = "ppo", hub: object = "none", **overrides: Any) -> BaseAlgorithm:
    values = {key.replace("__", "."): value for key, value in overrides.items()}
    config = small_config(algorithm, {"hub.name": str(hub), **values})
    return build_model(config, small_env(algorithm=algorithm))


def extractors(model: BaseAlgorithm, kind: type[nn.Module]) -> list[Any]:
    return [module for module in model.policy.modules() if isinstance(module, kind)]


def test_the_table_has_every_algorithm_of_the_configuration() -> None:
    assert algorithm_names() == ALGOS


@pytest.mark.parametrize("algorithm", ALGOS)
@pytest.mark.parametrize("hub", ["none", "hub5"])
def test_every_algorithm_learns_100_steps(algorithm: str, hub: str, hub5: Path) -> None:
    model = build(algorithm, hub5 if hub == "hub5" else hub)
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    model.learn(100, callback=PathwayCallback() if hub == "hub5" else None)
    after = model.policy.state_dict()
    layer, kind = ("scores", HubFeaturesExtractor) if hub == "hub5" else ("linear", BaselineCNN)
    assert extractors(model, kind)
    keys = [key for key in before if layer in key and "target" not in key]
    assert all(not torch.equal(before[key], after[key]) for key in keys)


@pytest.mark.parametrize(
    ("algorithm", "n_timesteps", "reason"),
    [
        ("ppo", 32, "in 32 steps: they are no more than one rollout (32), after which the learni"),
        ("ppo", 33, None),
        ("dqn", 16, "in 16 steps: they are no more than algorithm.learning_starts (20); raise -n"),
        ("dqn", 17, None),  # 2 environments make 8 steps each time
    ],
)
def test_a_run_too_short_to_learn(algorithm: str, n_timesteps: int, reason: str | None) -> None:
    model = build(algorithm)
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    model.learn(n_timesteps)
    after = model.policy.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before) == (reason is not None)
    config = small_config(algorithm, {"train.n_timesteps": n_timesteps})
    assert (reason or "None") in str(config.why_nothing_is_learned())


@pytest.mark.parametrize("algorithm", [name for name in ALGOS if name not in CONTINUOUS])
@pytest.mark.parametrize("hub", ["none", "hub5"])
def test_heads_are_single_linear_layers(algorithm: str, hub: str, hub5: Path) -> None:
    """SB3 would silently put two layers of 64 behind any extractor but its own NatureCNN."""
    model = build(algorithm, hub5 if hub == "hub5" else hub)
    names = [name for name, module in model.policy.named_modules() if isinstance(module, nn.Linear)]
    heads = {name for name in names if "features_extractor" not in name and "target" not in name}
    one = {"dqn": {"q_net.q_net.0"}, "qrdqn": {"quantile_net.quantile_net.0"}}
    assert heads == one.get(algorithm, {"action_net", "value_net"})


@pytest.mark.parametrize("algorithm", CONTINUOUS)
@pytest.mark.parametrize("hub", ["none", "hub5"])
def test_hidden_layers_are_the_configurations(algorithm: str, hub: str, hub5: Path) -> None:
    """SB3's own default for TD3 depends on the extractor's class."""
    layers = {"pi": [7], "qf": [6, 5]}
    model = build(algorithm, hub5 if hub == "hub5" else hub, algorithm__net_arch=layers)

    def widths(network: nn.Module, part: str) -> list[int]:
        modules = network.named_modules()
        return [
            module.out_features
            for name, module in modules
            if isinstance(module, nn.Linear) and name.startswith(part)
        ]

    actor = model.policy.actor
    assert widths(actor, "latent_pi" if hasattr(actor, "latent_pi") else "mu")[0] == 7
    assert widths(model.policy.critic, "qf0")[:2] == [6, 5]


@pytest.mark.parametrize("algorithm", ALGOS)
def test_pretrained_weights_are_intact(algorithm: str, hub5: Path) -> None:
    from hubrl.encoders import read_weights

    hub = load_hub(hub5)
    found = extractors(build(algorithm, hub5), HubFeaturesExtractor)
    assert len(found) == N_EXTRACTORS.get(algorithm, 1)
    for extractor in found:
        for spec, encoder in zip(hub.encoders, extractor.pathway.encoders, strict=True):
            path = hub.weights_path(spec)
            assert path is not None
            for key, value in read_weights(path, spec).items():
                assert torch.equal(encoder.trunk.state_dict()[key], value)


@pytest.mark.parametrize("algorithm", ["ppo", "dqn", "qrdqn"])
def test_the_optimizer_is_sb3s_but_fused(algorithm: str) -> None:
    plain = {"ppo": PPO, "dqn": DQN, "qrdqn": QRDQN}[algorithm]
    theirs = plain("CnnPolicy", small_env()).policy.optimizer
    ours = build(algorithm).policy.optimizer
    assert type(ours) is type(theirs)
    section = small_config(algorithm).algorithm
    eps = 0.01 / section.batch_size if algorithm == "qrdqn" else theirs.defaults["eps"]
    assert ours.defaults["fused"]
    assert ours.defaults["eps"] == eps
    assert ours.defaults["betas"] == theirs.defaults["betas"]
    assert ours.defaults["weight_decay"] == theirs.defaults["weight_decay"] == 0


def test_encoders_learn_at_the_share_of_the_rate_that_is_configured(hub5: Path) -> None:
    optimizer = build("ppo", hub5, hub__encoder_lr_scale=0.25).policy.optimizer
    heads, encoders = optimizer.param_groups
    n_weights = sum(len(encoder.weights) for encoder in HubPathway(hub5).encoders)
    assert (heads["lr_scale"], encoders["lr_scale"]) == (1.0, 0.25)
    assert len(encoders["params"]) == n_weights


def test_a2c_has_one_learning_rate(hub5: Path) -> None:
    with pytest.raises(ValueError, match=r"hub.encoder_lr_scale is 0.5, but a2c .* set it to 1"):
        build("a2c", hub5, hub__encoder_lr_scale=0.5)


def test_the_hub_section_reaches_the_extractor(hub5: Path) -> None:
    coef = {"start": 0.2, "end": 0.1}
    model = build(hub=hub5, hub__top_k=3, hub__freeze=["a"], hub__exploration_coef=coef)
    (extractor,) = extractors(model, HubFeaturesExtractor)
    extractor.progress_remaining = 0.5
    assert extractor.exploration_coef == pytest.approx(0.15)
    assert extractor.pathway.top_k == 3
    names = [n for n, _ in extractor.pathway.encoders.named_parameters()]
    assert any("b." in name for name in names)
    assert not any("a." in name for name in names)
    model = build(hub=hub5, hub__always_active=["b"], hub__aggregation="sum")
    (extractor,) = extractors(model, HubFeaturesExtractor)
    assert extractor.pathway.always_active == ("b",)
    assert isinstance(extractor.pathway.aggregator, Standardised)
    assert isinstance(extractor.pathway.aggregator.aggregator, Sum)
    (extractor,) = extractors(build(hub=hub5, hub__standardise=False), HubFeaturesExtractor)
    assert isinstance(extractor.pathway.aggregator, Sum)
    (extractor,) = extractors(build(hub=hub5, hub__freeze="all"), HubFeaturesExtractor)
    assert not [p for p in extractor.pathway.encoders.parameters() if p.requires_grad]


def test_what_is_chosen_is_frozen(hub5: Path) -> None:
    """The resolved configuration names them; ``a`` is always active, the first of the hub."""
    config = small_config(overrides={"hub.name": str(hub5), "hub.freeze": "chosen"})
    assert resolve(config).hub.freeze == tuple("bcde")
    (extractor,) = extractors(build(hub=hub5, hub__freeze="chosen"), HubFeaturesExtractor)
    assert [e.is_frozen for e in extractor.pathway.encoders] == [False, True, True, True, True]
    with pytest.raises(ValueError, match=r"freeze is 'chosen', but no encoder .* is always active"):
        build(hub=hub5, hub__freeze="chosen", hub__always_active=[])


def test_the_baseline_is_sb3s() -> None:
    """With the same seed: the same weights, and the same learning up to rounding."""
    ours = build(train__seed=7, algorithm__n_epochs=4)
    theirs = PPO(
        "CnnPolicy", small_env(), n_steps=16, batch_size=16, n_epochs=4, ent_coef=0.01, seed=7
    )
    theirs.clip_range = ours.clip_range
    theirs.lr_schedule = ours.lr_schedule
    for step in range(2):
        mine, other = ours.policy.state_dict(), theirs.policy.state_dict()
        assert mine.keys() == other.keys()
        for key in mine:
            torch.testing.assert_close(mine[key], other[key], atol=1e-6 * step, rtol=0)
        for model in (ours, theirs):
            model.set_random_seed(7)
            model.learn(64)


@pytest.mark.parametrize("freeze", ["", "all", "chosen"])
def test_the_fast_path_gives_the_update_of_the_plain_one(freeze: str, hub5: Path) -> None:
    """Bytes, kept features and fused Adam against SB3's floats, encoders that run, and its Adam."""
    options = {"hub__freeze": [freeze] if freeze else [], "algorithm__n_epochs": 4}
    ours = build(hub=hub5, train__seed=7, **options)
    settings = {"hub": str(hub5), "precision": "float32", "freeze": freeze or ()}
    theirs = PPO(
        "CnnPolicy",
        small_env(),
        n_steps=16,
        batch_size=16,
        n_epochs=4,
        ent_coef=0.01,
        seed=7,
        policy_kwargs={
            "features_extractor_class": HubFeaturesExtractor,
            "features_extractor_kwargs": settings,
            "net_arch": [],
        },
    )
    theirs.clip_range, theirs.lr_schedule = ours.clip_range, ours.lr_schedule
    (extractor,) = extractors(theirs, HubFeaturesExtractor)
    hash_bytes = extractor.replay.hash  # the noise follows from the bytes that the extractor gets
    extractor.replay.hash = lambda images: hash_bytes((images * 255).round().to(torch.uint8))
    extractor._cache.find = lambda i, hash_R: None
    for model in (ours, theirs):
        model.set_random_seed(7)
        model.learn(64)
    mine, other = ours.policy.state_dict(), theirs.policy.state_dict()
    assert mine.keys() == other.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], other[key], atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize("algorithm", [name for name in ALGOS if name not in CONTINUOUS])
@pytest.mark.parametrize("hub", ["none", "hub5"])
def test_uint8_images_give_the_features_that_sb3s_way_gives(
    algorithm: str, hub: str, hub5: Path
) -> None:
    model = build(algorithm, hub5 if hub == "hub5" else hub)
    images = torch.randint(0, 256, (6, 4, 36, 36), dtype=torch.uint8)
    networks = [m for m in model.policy.modules() if isinstance(m, RawImages)]
    assert networks
    model.policy.set_training_mode(False)
    for network in networks:
        extractor = network.features_extractor
        with torch.no_grad():
            raw, ours = network.extract_features(images, extractor), extractor(images.float() / 255)
            torch.testing.assert_close(raw, ours, atol=1e-6 * float(ours.abs().max()), rtol=0)


def test_baseline_in_bfloat16_is_close_and_float32_outside() -> None:
    space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    exact, fast = BaselineCNN(space), BaselineCNN(space, precision="bfloat16")
    fast.load_state_dict(exact.state_dict())
    images = torch.randint(0, 256, (6, 4, 84, 84), dtype=torch.uint8)
    expected, features = exact(images), fast(images)
    assert features.dtype == torch.float32
    error = (features - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < 0.02
    features.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in fast.parameters())


def test_baseline_learns_by_channels_what_sb3_learns_by_planes() -> None:
    space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    ours, theirs = BaselineCNN(space), NatureCNN(space)
    theirs.load_state_dict(ours.state_dict())
    seen: list[torch.Tensor] = []
    ours.cnn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.randint(0, 256, (6, 4, 84, 84), dtype=torch.uint8)
    for network, inputs in ((ours, images), (theirs, images / 255)):
        network(inputs).square().sum().backward()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("algorithm", ["dqn", "qrdqn"])
def test_actions_that_an_algorithm_cannot_take(algorithm: str) -> None:
    env = make_vec_env("hubrl/TinyImageContinuous-v0", 1)
    with pytest.raises(ValueError, match=f"'{algorithm}' takes Discrete actions, but env .* Box"):
        build_model(small_config(algorithm), env)


def test_recurrent_ppo_takes_no_switches() -> None:
    """Its rollout buffer can't hold them: the first update would fail."""
    env = small_env()
    env.action_space = gym.spaces.MultiBinary(3)
    message = r"'recurrent_ppo' takes Box or Discrete or MultiDiscrete actions, but env .* MultiBin"
    with pytest.raises(ValueError, match=message):
        build_model(small_config("recurrent_ppo"), env)


def test_an_agent_that_only_plays_has_no_room_for_what_it_would_learn_from() -> None:
    config = small_config("dqn", {"algorithm.buffer_size": 10**9})
    model: Any = build_model(config, small_env(), learns=False)
    assert model.replay_buffer.buffer_size == 1
    # SB3 would warn of minibatches that three environments don't fill.
    config = small_config("ppo", {"algorithm.n_steps": 10**9, "algorithm.batch_size": 256})
    model = build_model(config, small_env(3), learns=False)
    assert model.rollout_buffer.observations.nbytes < 10**6


def test_resolve_makes_a_hubs_path_absolute(hub5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub5.parent)
    for name in ("hub5", "hub5:a", "hub5/hub.yaml"):
        config = resolve(small_config(overrides={"hub.name": name}))
        assert config.hub.name == str(hub5.parent / name)
        load_hub(config.hub.name)
    assert resolve(small_config()).hub.name == "none"


def test_resolve_names_the_encoders_that_are_always_active(hub5: Path) -> None:
    save_hub(dataclasses.replace(load_hub(hub5), always_active=("c",)), hub5)
    for top_k, given, expected in (
        ("auto", "auto", ("c",)),
        (1, "auto", ()),
        (2, ["a"], ("a",)),
    ):
        changes = {"hub.name": str(hub5), "hub.top_k": top_k, "hub.always_active": given}
        config = resolve(small_config(overrides=changes))
        assert config.hub.always_active == expected
        assert config.hub.top_k == (2 if top_k == "auto" else top_k)
        assert resolve(config) == config
    assert resolve(small_config()).hub.always_active == ()


def test_resolve_measures_the_precision() -> None:
    config = resolve(small_config(overrides={"hub.precision": "auto"}))
    assert config.hub.precision in ("float32", "bfloat16")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_an_unknown_device(device: str) -> None:
    with pytest.raises(
        ValueError, match=f"train.device is '{device}', allowed on this machine: auto, cpu"
    ):
        resolve(small_config(overrides={"train.device": device}))
