"""The bare extractor in untouched SB3, for every algorithm: weights, gradients, noise, copies."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sb3_agents import (
    AGENTS,
    OFF_POLICY,
    ON_POLICY,
    FirstMinibatch,
    extractors_of,
    learning_extractors,
    make_agent,
    optimizers_of,
    parameters_of,
    spread_scores,
)
from sb3_contrib import TRPO
from small_hubs import nature_spec, write_hub
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.envs import FakeImageEnv
from torch import Tensor

import hubrl
import hubrl.extractor
from hubrl.losses import attach_loss

#: Enough steps for one update of each algorithm.
N_STEPS = {**dict.fromkeys(ON_POLICY, 32), "a2c": 8, **dict.fromkeys(OFF_POLICY, 12)}

#: Algorithms that clip gradients.
CLIPPED = (*ON_POLICY, "dqn")


def check_weights_are_the_files(model: BaseAlgorithm, hub: Path) -> None:
    """To the byte."""
    assert extractors_of(model)
    for extractor in extractors_of(model):
        for encoder in extractor.pathway.encoders:
            stored = load_file(hub / f"{encoder.spec.name}.safetensors")
            for key, tensor in encoder.trunk.state_dict().items():
                assert torch.equal(tensor, stored[key]), (encoder.spec.name, key)


class ExplicitSum:
    """
    An oracle: adds the exploration losses to the losses that SB3 calls ``backward`` on.

    A loss belongs to the optimizer that has its generator, and to the backward pass between that
    optimizer's ``zero_grad`` and ``step``.
    """

    def __init__(self, model: BaseAlgorithm, monkeypatch: pytest.MonkeyPatch, coef: float) -> None:
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._current: Any = None
        owner = [extractor.pathway.generator.scores.weight for extractor in extractors_of(model)]
        optimizers = optimizers_of(model).values()
        for extractor, weight in zip(extractors_of(model), owner, strict=True):
            learn = extractor._learn

            def keep(images: Tensor, learn: Any = learn, weight: Tensor = weight) -> Any:
                output = learn(images)
                self._pending.append((weight, output.exploration_loss))
                return output

            monkeypatch.setattr(extractor, "_learn", keep)
        monkeypatch.setattr(hubrl.extractor, "attach_loss", lambda features, loss: features)
        for optimizer in optimizers:
            zero_grad = optimizer.zero_grad

            def begin(*args: Any, optimizer: Any = optimizer, zero_grad: Any = zero_grad) -> None:
                self._current = optimizer
                zero_grad(*args)

            monkeypatch.setattr(optimizer, "zero_grad", begin)
        backward = torch.Tensor.backward

        def explicit(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            mine = {id(p) for p in parameters_of(self._current)} if self._current else set()
            taken = [term for weight, term in self._pending if id(weight) in mine]
            self._pending = [pair for pair in self._pending if id(pair[0]) not in mine]
            self._current = None
            backward(loss + coef * sum(taken) if taken else loss, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "backward", explicit)


def first_gradients(
    name: str, hub: Path, coef: float, prepare: Callable[[BaseAlgorithm], Any] = lambda model: None
) -> dict[str, list[Tensor]]:
    """Of each optimizer's parameters, at its first step; the data is the same for all calls."""
    # SAC's critic makes a step before its actor has a loss: no step may depend on the coefficient.
    settings: dict[str, Any] = {"learning_rate": 0.0}
    if name in CLIPPED:
        settings["max_grad_norm"] = 1e9
    model = make_agent(name, hub, settings, exploration_coef=coef)
    spread_scores(model)
    prepare(model)
    found: dict[str, list[Tensor]] = {}
    for part, optimizer in optimizers_of(model).items():

        def keep(optimizer: Any, *_: Any, part: str = part) -> None:
            gradients = [p.grad for p in parameters_of(optimizer)]
            found.setdefault(part, [torch.zeros(1) if g is None else g.clone() for g in gradients])

        optimizer.register_step_pre_hook(keep)
    model.learn(N_STEPS[name])
    assert found.keys() == optimizers_of(model).keys()
    return found


@pytest.mark.parametrize("name", AGENTS)
def test_gradients_are_those_of_the_explicit_sum_of_losses(
    name: str, hub5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached = first_gradients(name, hub5, 0.7)
    explicit = first_gradients(
        name, hub5, 0.7, lambda model: ExplicitSum(model, monkeypatch, coef=0.7)
    )
    for part, gradients in attached.items():
        for found, expected in zip(gradients, explicit[part], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-3


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("ppo", "dqn", "sac") else pytest.param(name, marks=pytest.mark.slow)
        for name in AGENTS
    ],
)
def test_doubling_the_coefficient_doubles_the_difference(name: str, hub5: Path) -> None:
    none, half, whole = (first_gradients(name, hub5, coef) for coef in (0.0, 0.5, 1.0))
    for part in none:
        difference = 0.0
        for zero, one, two in zip(none[part], half[part], whole[part], strict=True):
            torch.testing.assert_close(two - zero, 2 * (one - zero), atol=2e-6, rtol=1e-5)
            difference = max(difference, float((two - zero).abs().max()))
        assert difference > 1e-4, part


@pytest.mark.parametrize("name", AGENTS)
def test_noise_and_loss_are_where_learning_extractors_compute_gradients(
    name: str, hub5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never in predictions or targets, whose forward passes SB3 may run with grad."""
    model = make_agent(name, hub5)
    check_weights_are_the_files(model, hub5)
    attached: list[bool] = []
    seen: list[tuple[bool, bool]] = []
    route = hubrl.HubPathway.route

    def spy(features: Tensor, loss: Tensor) -> Tensor:
        attached.append(torch.is_grad_enabled())
        return attach_loss(features, loss)

    def spy_route(
        self: Any, images: Tensor, noise_BE: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        seen.append((noise_BE is not None, torch.is_grad_enabled()))
        return route(self, images, noise_BE, *args, **kwargs)

    monkeypatch.setattr(hubrl.extractor, "attach_loss", spy)
    monkeypatch.setattr(hubrl.HubPathway, "route", spy_route)
    learners = learning_extractors(model)
    for extractor in extractors_of(model):
        if not any(extractor is learner for learner in learners):
            monkeypatch.setattr(extractor, "_learn", pytest.fail)
    model.predict(model.observation_space.sample(), deterministic=False)
    assert not attached
    assert not any(noisy for noisy, _ in seen)
    seen.clear()
    model.learn(N_STEPS[name])
    assert attached
    assert all(attached)
    assert any(noisy for noisy, has_grad in seen if has_grad)
    # On-policy agents explore pathways while they collect, others only where they learn.
    assert any(noisy for noisy, has_grad in seen if not has_grad) == (name in ON_POLICY)
    seen.clear()
    model.predict(model.observation_space.sample(), deterministic=False)
    assert not any(noisy for noisy, _ in seen)


@pytest.mark.parametrize("options", [{}, pytest.param({"freeze": "all"}, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", AGENTS)
def test_save_load_copy_and_parameters(
    name: str, options: dict[str, Any], hub5: Path, tmp_path: Path
) -> None:
    model = make_agent(name, hub5, **options)
    model.learn(2 * N_STEPS[name])
    observations = np.stack([model.observation_space.sample() for _ in range(8)])
    expected, _ = model.predict(observations, deterministic=True)
    model.save(tmp_path / "model.zip")
    loaded = AGENTS[name].model.load(tmp_path / "model.zip", env=model.env, device="cpu")
    assert np.array_equal(loaded.predict(observations, deterministic=True)[0], expected)
    loaded.learn(N_STEPS[name], reset_num_timesteps=False)
    fresh = make_agent(name, hub5, **options)
    fresh.set_parameters(model.get_parameters(), device="cpu")
    assert np.array_equal(fresh.predict(observations, deterministic=True)[0], expected)
    policy = copy.deepcopy(model.policy)
    assert np.array_equal(policy.predict(observations, deterministic=True)[0], expected)


@pytest.mark.parametrize("name", AGENTS)
def test_frozen_encoders_stay_and_trained_ones_move(
    name: str, tmp_path: Path, batch_norm_architecture: str
) -> None:
    """BatchNorm statistics included, which would move in training mode."""
    normed = dataclasses.replace(
        nature_spec("norm"), architecture=batch_norm_architecture, features_dim=8
    )
    specs = [nature_spec("a"), nature_spec("b"), normed, dataclasses.replace(normed, name="norm2")]
    hub = write_hub(tmp_path / "hub", specs)
    model = make_agent(name, hub, freeze=["a", "norm"])
    spread_scores(model)
    model.learn(3 * N_STEPS[name])
    moved: dict[str, bool] = {}
    for extractor in learning_extractors(model):
        for encoder in extractor.pathway.encoders:
            stored = load_file(hub / f"{encoder.spec.name}.safetensors")
            same = all(torch.equal(t, stored[k]) for k, t in encoder.trunk.state_dict().items())
            moved[encoder.spec.name] = moved.get(encoder.spec.name, False) or not same
            for key in ("norm.running_mean", "norm.running_var"):
                if key in stored:
                    assert torch.equal(encoder.trunk.state_dict()[key], stored[key])
    assert moved == {"a": False, "b": True, "norm": False, "norm2": True}


@pytest.mark.parametrize("name", AGENTS)
def test_one_hub_in_memory(name: str, hub5: Path) -> None:
    """However many extractors the algorithm builds, frozen encoders are held once."""
    model = make_agent(name, hub5, freeze="all")
    check_weights_are_the_files(model, hub5)
    storages = {
        weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes()
        for extractor in extractors_of(model)
        for encoder in extractor.pathway.encoders
        for weight in encoder.parameters()
    }
    one_hub = sum(
        tensor.numel() * tensor.element_size()
        for letter in "abcde"
        for tensor in load_file(hub5 / f"{letter}.safetensors").values()
    )
    assert sum(storages.values()) <= 1.05 * one_hub
    encoders = [e for extractor in extractors_of(model) for e in extractor.pathway.encoders]
    frozen = {id(weight) for encoder in encoders for weight in encoder.parameters()}
    in_optimizers = {id(p) for o in optimizers_of(model).values() for p in parameters_of(o)}
    assert not frozen & in_optimizers
    assert not frozen & {id(parameter) for parameter in model.policy.parameters()}
    assert not [key for key in model.policy.state_dict() if "encoders" in key]


def test_trpo_is_refused(hub5: Path) -> None:
    """ARS takes no features extractor at all."""
    env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=4, channel_first=True)
    kwargs = {
        "features_extractor_class": hubrl.HubFeaturesExtractor,
        "features_extractor_kwargs": {"hub": str(hub5)},
    }
    with pytest.raises(ValueError, match=r"TRPO can't train a hub: it differentiates.*use PPO"):
        TRPO("CnnPolicy", env, policy_kwargs=kwargs)


ROUTINGS: list[dict[str, Any]] = [
    {},
    {"freeze": "all"},
    {"freeze": "a", "always_active": "norm"},
    {"freeze": "norm", "always_active": "norm"},
    {"aggregation": "sum"},
]


def _is_quick(name: str, options: dict[str, Any], precision: str) -> bool:
    if name == "ppo":
        return precision == "float32" or not options
    return precision == "float32" and not options


@pytest.mark.parametrize(
    ("name", "options", "precision", "bound"),
    [
        pytest.param(
            *(name, options, precision, bound),
            marks=[] if _is_quick(name, options, precision) else pytest.mark.slow,
        )
        for name in ON_POLICY
        for options in ROUTINGS
        for precision, bound in (("float32", 1e-5), ("bfloat16", 1e-3))
    ],
)
def test_update_begins_with_the_rollouts_policy(
    name, options, precision, bound, tmp_path, batch_norm_architecture
) -> None:
    normed = dataclasses.replace(
        nature_spec("norm"), architecture=batch_norm_architecture, features_dim=8
    )
    one_length = options.get("aggregation") == "sum"
    specs = [nature_spec("a"), nature_spec("b"), nature_spec("c") if one_length else normed]
    hub = write_hub(tmp_path / "hub", specs)
    model = make_agent(name, hub, precision=precision, **options)
    spread_scores(model)
    with torch.no_grad():  # far from the 0.01 gain of the start, so that a wrong routing shows
        model.policy.action_net.weight.mul_(30)
    first = FirstMinibatch(model)
    for _ in range(3):
        first.next()
        model.learn(N_STEPS[name], reset_num_timesteps=False)
    assert len(first.errors) == 3
    assert max(first.errors) <= bound


def test_padding_of_sequences_is_neither_dispatched_nor_counted(
    hub5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Episodes of 10 steps in minibatches of 16: sequences of unequal length, padded to 10."""
    model = make_agent("recurrent_ppo", hub5, {"n_epochs": 1})
    spread_scores(model)
    (extractor,) = extractors_of(model)
    learned: list[Tensor] = []
    learn = extractor._learn

    def spy(images: Tensor) -> Any:
        learned.append(images.flatten(1).sum(dim=1))
        output = learn(images)
        assert len(output.probabilities) == len(images)  # what the mean is taken of
        return output

    monkeypatch.setattr(extractor, "_learn", spy)
    first = FirstMinibatch(model)
    model.learn(32)
    assert first.n_padding > 0
    assert first.errors[0] <= 1e-5
    assert sum(map(len, learned)) == 32
    assert all((sums > 0).all() for sums in learned)
