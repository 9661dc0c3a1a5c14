"""The extractor inside untouched SB3 agents: weights, gradients, noise, ratio, save and load."""

import copy
import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file
from sb3_agents import AGENTS, FirstMinibatch, extractors_of, make_agent, spread_scores
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor
from torch.distributions import Distribution

import hubrl
import hubrl.extractor
from hubrl.specs import load_hub


def extractor_of(model: BaseAlgorithm) -> hubrl.HubFeaturesExtractor:
    return extractors_of(model)[0]


def test_sb3s_orthogonal_init_reaches_the_rest_of_the_policy(hub5: Path) -> None:
    # The action head's gain of 0.01 is what SB3 users compare with.
    weight = make_agent("ppo", hub5).policy.action_net.weight
    assert weight.norm(dim=1).max().item() == pytest.approx(0.01, rel=1e-4)


class Twin(BaseFeaturesExtractor):
    """The same hub without an attached loss; keeps the loss for an explicit sum."""

    def __init__(self, space: spaces.Box, extractor: hubrl.HubFeaturesExtractor) -> None:
        super().__init__(space, extractor.features_dim)
        self.extractor = extractor
        self.losses: list[torch.Tensor] = []

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self.extractor.pathway.route(observations, None).features
        output = self.extractor._learn(observations)
        self.losses.append(output.exploration_loss)
        return output.features


def ppo_loss(model: BaseAlgorithm, data: Any) -> torch.Tensor:
    """PPO's loss written out (Schulman et al. 2017), as SB3 computes it."""
    values, log_prob, entropy = model.policy.evaluate_actions(
        data.observations, data.actions.long().flatten()
    )
    advantages = (data.advantages - data.advantages.mean()) / (data.advantages.std() + 1e-8)
    ratio = (log_prob - data.old_log_prob).exp()
    clipped = ratio.clamp(0.8, 1.2)
    surrogate = -torch.min(advantages * ratio, advantages * clipped).mean()
    value_loss = torch.nn.functional.mse_loss(data.returns, values.flatten())
    return surrogate + 0.5 * value_loss - 0.01 * entropy.mean()


def gradients(model: BaseAlgorithm, loss: torch.Tensor) -> list[torch.Tensor]:
    parameters = [p for p in model.policy.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True))


def collected(coef: float, hub: Path) -> tuple[BaseAlgorithm, Any]:
    """A PPO agent that has collected one rollout, and a minibatch of it."""
    model = make_agent("ppo", hub, {"n_steps": 32, "batch_size": 16}, exploration_coef=coef)
    spread_scores(model)
    _, callback = model._setup_learn(32)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, n_rollout_steps=32)
    model.policy.set_training_mode(True)
    np.random.seed(0)
    return model, next(model.rollout_buffer.get(16))


def test_gradient_is_task_plus_coefficient_times_exploration(hub5: Path) -> None:
    model, data = collected(0.7, hub5)
    attached = gradients(model, ppo_loss(model, data))
    extractor = extractor_of(model)
    twin = Twin(model.observation_space, extractor)
    model.policy.features_extractor = model.policy.pi_features_extractor = twin
    model.policy.vf_features_extractor = twin
    task = ppo_loss(model, data)
    explicit = gradients(model, task + 0.7 * twin.losses[-1])
    largest = 0.0
    for found, expected in zip(attached, explicit, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        largest = max(largest, found.abs().max().item())
    assert largest > 1e-3


def test_only_collecting_and_learning_are_noisy(hub5: Path, monkeypatch) -> None:
    model = make_agent("ppo", hub5)
    seen = []
    route = hubrl.HubPathway.route

    def spy(self, images, noise_BE, *args, **kwargs):
        seen.append(noise_BE is not None)
        return route(self, images, noise_BE, *args, **kwargs)

    monkeypatch.setattr(hubrl.HubPathway, "route", spy)
    policy, images = model.policy, torch.zeros(2, *model.observation_space.shape)
    policy.set_training_mode(False)
    policy.get_distribution(images)  # with grad, as in a user's own script
    with torch.no_grad():
        policy(images, deterministic=True)
        policy(images)  # nor is this a rollout, of which something would be kept
    assert seen == [False] * 3
    assert not extractor_of(model).replay._collected
    model.learn(1, callback=lambda *_: policy.predict(images.numpy()) is None)
    assert seen == [False] * 3 + [True, False]
    policy.set_training_mode(True)
    policy.predict_values(images)
    assert seen[-1] is True


def test_without_replay_the_ratio_is_far_from_one(hub5: Path, monkeypatch) -> None:
    """The check above can fail: with fresh noise in each forward it does."""
    model = make_agent("ppo", hub5, {"n_steps": 32, "batch_size": 16}, always_active=())
    spread_scores(model)
    with torch.no_grad():
        model.policy.action_net.weight.mul_(30)
    replay = extractor_of(model).replay
    monkeypatch.setattr(replay, "noise", lambda hash_B: torch.randn(len(hash_B), 5))
    monkeypatch.setattr(replay, "recall", lambda hash_B: None)
    first = FirstMinibatch(model)
    model.learn(32)
    assert first.errors[0] > 1e-2


def test_the_set_stays_and_the_weights_move_during_an_update(hub5: Path, monkeypatch) -> None:
    model = make_agent(
        "ppo", hub5, {"n_steps": 32, "batch_size": 32, "n_epochs": 5, "learning_rate": 0.01}
    )
    spread_scores(model)
    seen: dict[int, set[tuple[int, ...]]] = {}
    extractor = extractor_of(model)
    learn = extractor._learn

    def spy(observations):
        output = learn(observations)
        for key, row in zip(
            extractor.replay.hash(observations).tolist(), output.activated.tolist(), strict=True
        ):
            seen.setdefault(key, set()).add(tuple(row))
        return output

    monkeypatch.setattr(extractor, "_learn", spy)
    before = extractor.pathway.generator.scores.weight.clone()
    model.learn(32)
    assert not torch.equal(before, extractor.pathway.generator.scores.weight)
    assert len(seen) == 32
    assert all(len(rows) == 1 for rows in seen.values())


def test_frozen_encoders_run_once_for_an_observation(hub5: Path, monkeypatch) -> None:
    model = make_agent(
        "ppo", hub5, {"n_steps": 32, "batch_size": 8, "n_epochs": 3}, freeze=["a", "b"]
    )
    spread_scores(model)
    pathway = extractor_of(model).pathway
    rows = {(name, grad): 0 for name in "abcde" for grad in (False, True)}
    encode = pathway.encode

    def counted(i, images, rows_R, casts=None):
        rows["abcde"[i], torch.is_grad_enabled()] += len(rows_R)
        return encode(i, images, rows_R, casts)

    monkeypatch.setattr(pathway, "encode", counted)
    model.learn(32)
    assert rows["a", True] == rows["b", True] == 0
    assert rows["a", False] + rows["b", False] > 0
    assert sum(rows[name, True] for name in "cde") > 0


@pytest.mark.parametrize("options", [{}, {"always_active": "b", "aggregation": "sum"}])
def test_cached_features_give_the_update_that_running_the_encoders_gives(
    options, hub5: Path, monkeypatch
) -> None:
    def weights_after(is_cached: bool) -> dict[str, torch.Tensor]:
        model = make_agent("ppo", hub5, {"n_steps": 32, "batch_size": 8}, freeze="all", **options)
        spread_scores(model)
        model.env.envs[0].unwrapped.observation_space.seed(0)
        if not is_cached:
            monkeypatch.setattr(extractor_of(model)._cache, "find", lambda i, hash_R: None)
        model.learn(32)
        return model.policy.state_dict()

    cached, run = weights_after(True), weights_after(False)
    assert cached.keys() == run.keys()
    for key in cached:
        torch.testing.assert_close(cached[key], run[key], atol=1e-5, rtol=0, msg=key)


def test_an_encoder_that_is_thawed_runs_and_learns_again(hub5: Path) -> None:
    model = make_agent(
        "ppo", hub5, {"n_steps": 32, "batch_size": 8}, freeze="all", random_init=True
    )
    spread_scores(model)
    model.learn(32)
    encoders = list(extractor_of(model).pathway.encoders)
    before = [copy.deepcopy(encoder.state_dict()) for encoder in encoders]
    for encoder in encoders:
        encoder.requires_grad_(True)
    # Collected while frozen: features in the cache must not stand in for encoders that learn.
    model.train()
    changed = [
        any(not torch.equal(old[key], value) for key, value in encoder.state_dict().items())
        for old, encoder in zip(before, encoders, strict=True)
    ]
    assert any(changed)


def test_evaluation_amid_a_rollout_does_not_disturb_it(hub5: Path) -> None:
    model = make_agent("ppo", hub5, {"n_steps": 32, "batch_size": 16})
    spread_scores(model)
    first = FirstMinibatch(model)
    model.learn(32, callback=lambda *_: model.predict(model.observation_space.sample()) and True)
    assert first.errors[0] <= 1e-5


class Film(gymnasium.Env):
    """The same images in each episode: what was seen in a rollout is seen again in the next."""

    observation_space = spaces.Box(0, 255, (4, 36, 36), np.uint8)
    action_space = spaces.Discrete(6)
    images = np.random.default_rng(0).integers(256, size=(21, 4, 36, 36)).astype(np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.place = 0
        return self.images[0], {}

    def step(self, action: int) -> Any:
        self.place += 1
        return self.images[self.place], float(action == 0), self.place == 20, False, {}


@pytest.mark.parametrize("options", [{"always_active": ()}, {"freeze": "all", "random_init": True}])
def test_weights_that_are_loaded_amid_a_rollout_have_routing_and_features_of_their_own(
    hub5: Path, options: dict[str, Any]
) -> None:
    settings = {"n_steps": 32, "batch_size": 32, "learning_rate": 1e-3}
    model, other = (make_agent("ppo", hub5, settings, **options) for _ in range(2))
    torch.manual_seed(1)
    for agent in (model, other):
        spread_scores(agent)
        with torch.no_grad():
            for weight in (agent.policy.action_net.weight, *extractor_of(agent).parameters()):
                weight.add_(torch.randn_like(weight), alpha=0.1)
    model.set_env(DummyVecEnv([Film]))
    model.learn(64, callback=lambda *_: model.num_timesteps < 50)
    model.set_parameters(other.get_parameters())
    first = FirstMinibatch(model)
    model.learn(32)
    assert first.errors[0] <= 1e-5


class OwnWords(ActorCriticCnnPolicy):
    """Its ``forward`` sees features by way of its other methods."""

    def forward(self, obs: Tensor, deterministic: bool = False) -> Any:
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("kind", ["own", "compiled"])
def test_policies_of_other_makes_collect_what_they_learn_from(
    hub5: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "own":
        monkeypatch.setitem(AGENTS, "ppo", AGENTS["ppo"]._replace(policy=OwnWords))
    model = make_agent("ppo", hub5, always_active=())
    spread_scores(model)
    with torch.no_grad():
        model.policy.action_net.weight.mul_(30)
    if kind == "compiled":
        monkeypatch.setattr(Distribution, "_validate_args", True)  # Dynamo sets it to False
        model.policy = torch.compile(model.policy, backend="eager")
    first = FirstMinibatch(model)
    model.learn(32)
    assert first.errors[0] <= 1e-5


def test_an_opponent_within_the_environment_does_not_collect(hub5: Path) -> None:
    opponent = make_agent("ppo", hub5)
    spread_scores(opponent)
    opponent.policy.set_training_mode(False)
    image = torch.randint(256, (1, 4, 36, 36), dtype=torch.uint8)
    values: list[float] = []

    def value() -> float:
        with torch.no_grad():
            return opponent.policy(image)[1].item()

    class Match(Film):
        def step(self, action: int) -> Any:
            values.append(value())
            return super().step(action)

    model = make_agent("ppo", hub5)
    model.set_env(DummyVecEnv([Match]))
    model.learn(32)
    assert set(values) == {value()}
    assert not extractor_of(opponent).replay._collected


@pytest.mark.parametrize("options", [{}, {"always_active": "b", "aggregation": "sum"}])
def test_a_target_network_follows_its_polyak_updates_in_bfloat16(options, hub5: Path) -> None:
    model = make_agent("dqn", hub5, precision="bfloat16", **options)
    observations = torch.rand(4, 4, 36, 36)
    with torch.no_grad():
        before = model.q_net_target(observations)
        for parameter in model.q_net.parameters():
            parameter.mul_(1.5)
        polyak_update(model.q_net.parameters(), model.q_net_target.parameters(), tau=1.0)
        model.policy.set_training_mode(False)
        after, expected = model.q_net_target(observations), model.q_net(observations)
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


def test_frozen_encoders_stay_and_trained_ones_move(hub5: Path) -> None:
    model = make_agent("ppo", hub5, {"n_steps": 32, "batch_size": 16}, freeze=["a", "b"])
    spread_scores(model)  # so that each encoder is activated
    model.learn(64)
    for encoder in extractor_of(model).pathway.encoders:
        stored = load_file(hub5 / f"{encoder.spec.name}.safetensors")
        same = all(torch.equal(t, stored[key]) for key, t in encoder.trunk.state_dict().items())
        assert same == (encoder.spec.name in "ab")


def test_statistics_name_every_encoder(hub5: Path) -> None:
    model = make_agent("ppo", hub5, {"n_steps": 32, "batch_size": 16})
    extractor = extractor_of(model)
    assert extractor.statistics() == {}
    model.learn(32)
    statistics = extractor.statistics()
    usage = [statistics[f"usage_{name}"] for name in "abcde"]
    assert sum(usage) == pytest.approx(1.0, abs=1e-6)
    assert 0 < statistics["entropy"] <= np.log(5) + 1e-6
    assert -np.log(5) - 1e-6 <= statistics["exploration_loss"] < 0
    assert extractor.statistics() == {}


def test_images_that_were_normalised_before(hub5: Path) -> None:
    env = VecNormalize(DummyVecEnv([lambda: FakeImageEnv(36, 36, n_channels=3)]))
    kwargs = {"features_extractor_class": hubrl.HubFeaturesExtractor}
    message = r"reach -10, but float images must lie in 0..1: .*; VecNormalize must leave images"
    with pytest.raises(ValueError, match=message):
        PPO("CnnPolicy", env, policy_kwargs=kwargs | {"features_extractor_kwargs": {"hub": hub5}})


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, ("a",)),
        ({"top_k": 2}, ("a",)),
        ({"top_k": 1}, ()),
        ({"top_k": 5}, ()),
        ({"top_k": 2, "always_active": []}, ()),
        ({"top_k": 2, "always_active": "c"}, ("c",)),
        ({"top_k": 5, "generator": "uniform"}, ()),
    ],
)
def test_an_agent_has_one_encoder_always_active(
    arguments: dict[str, Any], expected: tuple[str, ...], hub5: Path
) -> None:
    space = spaces.Box(0, 255, (4, 36, 36), np.uint8)
    extractor = hubrl.HubFeaturesExtractor(space, hub=hub5, **arguments)
    assert extractor.pathway.always_active == expected
    card = dataclasses.replace(load_hub(hub5), always_active=("d",))
    extractor = hubrl.HubFeaturesExtractor(space, hub=card, top_k=2)
    assert extractor.pathway.always_active == ("d",)


def test_a_frozen_extractor_stays_as_it_is(hub5: Path) -> None:
    model = make_agent("ppo", hub5)
    model.learn(32)
    (extractor,) = extractors_of(model)
    extractor.requires_grad_(False)
    images = torch.randint(0, 256, (4, 4, 36, 36), dtype=torch.uint8)
    features = extractor.eval()(images)
    extractor.train()
    before = [buffer.clone() for buffer in extractor.pathway.buffers()]
    model.learn(64)
    extractor.eval().train()  # what an update begins with is what the last one ended with
    assert all(map(torch.equal, extractor.pathway.buffers(), before))
    assert torch.equal(extractor.eval()(images), features)


def test_schedule_by_hand(hub5: Path) -> None:
    space = spaces.Box(0, 255, (4, 36, 36), np.uint8)
    extractor = hubrl.HubFeaturesExtractor(
        space, hub=hub5, exploration_coef={"start": 0.1, "end": 0.02}
    )
    with pytest.raises(ValueError, match=r"exploration_coef is a schedule.*hubrl\.PathwayCallback"):
        extractor(torch.zeros(1, 4, 36, 36))
    extractor.progress_remaining = 0.25  # three quarters are over
    assert extractor.exploration_coef == pytest.approx(0.04)
    extractor.progress_remaining = -0.1  # a rollout of whole episodes passes the end
    assert extractor.exploration_coef == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 9}, "top_k is 9, allowed: 1..5"),
        ({"hub": "nowhere"}, "hub 'nowhere' is unknown"),
        ({"freeze": "z"}, "has no encoder 'z'"),
        ({"aggregation": "mean"}, "aggregation is 'mean', allowed: auto, concat, sum"),
        ({"always_active": "z"}, "has no encoder 'z'"),
        ({"always_active": ["a", "c"]}, "always_active is a, c, but top_k is 2: at least"),
        ({"exploration_coef": -1.0}, "exploration_coef is .*allowed: a number of at least 0"),
        ({"exploration_coef": {"begin": 1}}, "exploration_coef is .*allowed: a number"),
        (
            {"exploration_coef": math.nan},
            "exploration_coef is nan, allowed: a number of at",
        ),
        ({"exploration_coef": lambda left: left}, r"coef is <function .*\{'start': a, 'end': b\}"),
        ({"exploration_coef": None}, "exploration_coef is None, allowed: a number"),
        ({"exploration_coef": {"start": "a", "end": 0}}, "exploration_coef is .*allowed: a number"),
        ({"generator": "smal"}, r"'smal' \(closest: 'small'\), allowed: small, even, uniform$"),
        (
            {"generator": "resnet10"},
            "is for image tasks: .* its batch.*; allowed: small, even, uniform",
        ),
        ({"precision": "int8"}, "precision is 'int8', allowed: auto, float32, bfloat16"),
    ],
)
def test_wrong_arguments(hub5: Path, arguments: dict[str, Any], message: str) -> None:
    space = spaces.Box(0, 255, (4, 36, 36), np.uint8)
    with pytest.raises(ValueError, match=message):
        hubrl.HubFeaturesExtractor(space, **{"hub": hub5, **arguments})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((17,), r"shape \(17,\), but encoder 'a' takes images \(C, H, W\)"),
        ((4, 12, 12), "images of 12x12 px, but encoder 'a' takes 36x36 px"),
        ((1, 36, 36), "has 1 channels, but encoder 'a' takes 4"),
    ],
)
def test_observation_space_that_no_encoder_takes(hub5: Path, shape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hubrl.HubFeaturesExtractor(spaces.Box(0, 255, shape, np.uint8), hub=hub5)


def test_pixels_out_of_range_are_noticed(hub5: Path) -> None:
    space = spaces.Box(0, 255, (4, 36, 36), np.uint8)
    extractor = hubrl.HubFeaturesExtractor(space, hub=hub5)
    with pytest.raises(ValueError, match=r"observations reach 255, but float images must lie in"):
        extractor(torch.full((1, 4, 36, 36), 255.0))


def test_whole_numbers_do_not_tell_their_range(hub5: Path) -> None:
    """A first frame that is nearly black may be of images in 0..255."""
    space = spaces.Box(0, 255, (4, 36, 36), np.uint8)
    extractor = hubrl.HubFeaturesExtractor(space, hub=hub5)
    extractor(torch.ones(1, 4, 36, 36))
    with pytest.raises(ValueError, match=r"observations reach 255, but float images must lie in"):
        extractor(torch.full((1, 4, 36, 36), 255.0))


def test_learning_without_a_rollout_goes_on_with_the_features_it_learns_from(hub5: Path) -> None:
    """As of demonstrations: what prediction sees was seen while it learned."""
    model = make_agent("ppo", f"{hub5}:a", top_k=1, freeze="all")
    extractor, policy = extractor_of(model), model.policy
    images = torch.randint(0, 256, (64, 4, 36, 36), dtype=torch.uint8)
    policy.set_training_mode(True)
    for _ in range(40):
        policy.evaluate_actions(images, torch.zeros(64))
    with torch.no_grad():
        learned_from = extractor.pathway.route(images, None).features
        policy.set_training_mode(False)
        predicted_from = extractor.pathway.route(images, None).features
    torch.testing.assert_close(predicted_from, learned_from, atol=0.01, rtol=0.01)


def test_a_rollout_is_learned_from_with_its_own_features(hub5: Path) -> None:
    """Until the update is over, whatever is learned meanwhile."""
    model = make_agent("ppo", hub5).learn(64)
    extractor = extractor_of(model)
    model.policy.set_training_mode(True)
    mean = extractor.pathway.aggregator.start_mean_0.clone()
    for data in model.rollout_buffer.get(16):
        model.policy.evaluate_actions(data.observations, data.actions.flatten())
    assert torch.equal(extractor.pathway.aggregator.start_mean_0, mean)
    assert not torch.equal(extractor.pathway.aggregator.running_mean_0, mean)


def test_a_trace_routes_each_observation(hub5: Path) -> None:
    """And has not the dispatch of the batch that it was made of."""
    model = make_agent("ppo", hub5, always_active=(), top_k=1)
    spread_scores(model)
    extractor = extractor_of(model).eval()
    images = torch.randint(0, 256, (32, 4, 36, 36), dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(extractor, images[:1], check_trace=False)
        expected = extractor(images)
        found = torch.cat([traced(image[None]) for image in images])
    assert len(extractor.pathway.route(images, None).activated.unique()) > 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_random_init_has_nothing_of_the_hub(hub5: Path) -> None:
    space = spaces.Box(0, 255, (4, 36, 36), np.uint8)
    extractor = hubrl.HubFeaturesExtractor(space, hub=hub5, random_init=True)
    stored = load_file(hub5 / "a.safetensors")
    assert not torch.equal(
        extractor.pathway.encoders[0].trunk.cnn[0].weight, stored["cnn.0.weight"]
    )


def test_the_hub_may_be_a_spec(hub5: Path) -> None:
    space = spaces.Box(0, 255, (4, 36, 36), np.uint8)
    assert hubrl.HubFeaturesExtractor(space, hub=load_hub(hub5)).pathway.top_k == 2
