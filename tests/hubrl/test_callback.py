"""``PathwayCallback`` with users' own SB3 agents."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sb3_agents import learning_extractors, make_agent
from small_runs import small_env
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.policies import ActorCriticCnnPolicy

from hubrl.callback import PathwayCallback
from hubrl.extractor import HubFeaturesExtractor


class Memory(KVWriter):
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.rows.append(dict(key_values))


def policy_kwargs(hub: Path, **kwargs: Any) -> dict[str, Any]:
    return {
        "features_extractor_class": HubFeaturesExtractor,
        "features_extractor_kwargs": {"hub": hub, **kwargs},
        "net_arch": [],
    }


def log(model: BaseAlgorithm, n_timesteps: int) -> list[dict[str, Any]]:
    memory = Memory()
    model.set_logger(Logger(None, [memory]))
    model.learn(n_timesteps, callback=PathwayCallback())
    return memory.rows


def test_statistics_and_schedule_are_logged(hub5: Path) -> None:
    coef = {"start": 0.1, "end": 0.0}
    model = PPO(
        "CnnPolicy",
        small_env(),
        n_steps=16,
        batch_size=16,
        n_epochs=1,
        policy_kwargs=policy_kwargs(hub5, exploration_coef=coef),
    )
    rows = log(model, 96)
    assert "pathway/entropy" not in rows[0], "SB3 logs the first rollout before it learned"
    for row, coefficient in zip(rows[1:], [0.1 * 2 / 3, 0.1 * 1 / 3], strict=True):
        usage = [row[f"pathway/usage_{name}"] for name in "abcde"]
        assert sum(usage) == pytest.approx(1.0)
        assert 0 <= row["pathway/entropy"] <= 1.6095
        assert -1.6095 <= row["pathway/exploration_loss"] <= 0
        assert row["pathway/exploration_coef"] == pytest.approx(coefficient)


@pytest.mark.parametrize("name", ["ppo", "dqn"])
def test_each_update_has_the_coefficient_of_sb3s_progress(name: str, hub5: Path) -> None:
    short = {"n_steps": 8, "batch_size": 8, "n_epochs": 1} if name == "ppo" else {}
    model = make_agent(name, hub5, short, exploration_coef={"start": 0.1, "end": 0.0})
    (extractor,) = learning_extractors(model)
    train, seen = model.train, []

    def record(*arguments: Any, **named: Any) -> None:
        seen.append((extractor.exploration_coef, 0.1 * model._current_progress_remaining))
        train(*arguments, **named)

    model.train = record
    for _ in range(2):
        model.learn(24, callback=PathwayCallback())
    assert len(seen) >= 6
    for found, expected in seen:
        assert found == pytest.approx(expected)
    with pytest.raises(ValueError, match="exploration_coef is a schedule, but nothing tells"):
        model.learn(24)


def test_off_policy_agents_log_what_their_online_network_learns(hub5: Path) -> None:
    model = DQN(
        "CnnPolicy",
        small_env(),
        buffer_size=100,
        learning_starts=8,
        policy_kwargs=policy_kwargs(hub5, top_k=1),
    )
    last = log(model, 100)[-1]
    assert sum(last[f"pathway/usage_{name}"] for name in "abcde") == pytest.approx(1.0)


def test_a_collapse_is_warned_of_once(hub5: Path) -> None:
    model = PPO(
        "CnnPolicy",
        small_env(),
        n_steps=16,
        batch_size=16,
        n_epochs=1,
        policy_kwargs=policy_kwargs(hub5, always_active=()),
    )
    scores = model.policy.features_extractor.pathway.generator.scores
    with torch.no_grad():
        scores.bias[2] = 50.0
    message = (
        r"pathway collapse: encoder 'c' has 100% of the pathway probability since step 32; raise "
        r"exploration_coef \(now 0.01\), or take the encoder alone, .*: hub hub5:c"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        model.learn(160, callback=PathwayCallback(collapse_steps=64))
    assert len(caught) == 1


def test_a_collapse_in_a_run_of_many_calls(hub5: Path) -> None:
    """A new callback for each call of ``learn`` goes on where the last one was."""
    kwargs = policy_kwargs(hub5, always_active=())
    settings = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "policy_kwargs": kwargs}
    model = PPO("CnnPolicy", small_env(), **settings)
    with torch.no_grad():
        model.policy.features_extractor.pathway.generator.scores.bias[2] = 50.0

    def learn_in_parts() -> None:
        for _ in range(6):
            callback = PathwayCallback(collapse_steps=64)
            model.learn(32, reset_num_timesteps=False, callback=callback)

    with pytest.warns(UserWarning, match=r"of the pathway probability since step 32") as caught:
        learn_in_parts()
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("shares", "n_warnings"),
    [
        ([0.96] * 4, 1),  # from 100 to 400 steps
        ([0.94] * 4, 0),  # probable, but not alone
        ([0.96, 0.96, 0.5, 0.96], 0),  # spread in between
        ([0.96, 0.96, 0.5, 0.96, 0.96, 0.96, 0.96, 0.96, 0.96], 1),  # once
    ],
)
@pytest.mark.filterwarnings("always:pathway collapse:UserWarning")
def test_what_a_collapse_is(shares: list[float], n_warnings: int, hub5: Path) -> None:
    model = make_agent("ppo", hub5, always_active=())
    (extractor,) = learning_extractors(model)
    callback = PathwayCallback(collapse_steps=300)
    callback.init_callback(model)
    rest = ("a", "b", "d", "e")
    with warnings.catch_warnings(record=True) as caught:
        for i, share in enumerate(shares):
            callback.num_timesteps = 100 * (i + 1)
            statistics = {f"probability_{name}": (1 - share) / 4 for name in rest}
            statistics["probability_c"] = share
            callback._notice_collapse(extractor, statistics)
    assert len(caught) == n_warnings


def test_fifty_thousand_steps_are_a_collapse() -> None:
    assert PathwayCallback()._collapse_steps == 50_000


def test_no_collapse_where_probabilities_are_spread_or_nothing_is_chosen(hub5: Path) -> None:
    kwargs = policy_kwargs(hub5, top_k=5, always_active=list("abcd"))
    for each in (policy_kwargs(hub5), kwargs):
        model = PPO(
            "CnnPolicy", small_env(), n_steps=16, batch_size=16, n_epochs=1, policy_kwargs=each
        )
        model.learn(64, callback=PathwayCallback(collapse_steps=0))


TWO_LAYERS = r"SB3 has added two layers of 64 units.*: give net_arch=\[\] among policy_kwargs"
NO_LAYERS = r"net_arch leaves the critic without layers.*: give qf layers, or leave"


@pytest.mark.parametrize(
    ("name", "net_arch", "message"),
    [
        ("ppo", None, TWO_LAYERS),
        ("recurrent_ppo", None, TWO_LAYERS),
        ("dqn", None, TWO_LAYERS),
        ("sac", [], NO_LAYERS),
        ("crossq", {"pi": [8], "qf": []}, NO_LAYERS),
    ],
)
def test_layers_that_suit_other_extractors(
    name: str, net_arch: Any, message: str, hub5: Path
) -> None:
    model = make_agent(name, hub5, policy={"net_arch": net_arch})
    with pytest.warns(UserWarning, match=message):
        model.learn(1, callback=PathwayCallback())


class WithoutLayers(ActorCriticCnnPolicy):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, net_arch=[])


def test_a_policy_of_ones_own_without_layers(hub5: Path) -> None:
    kwargs = policy_kwargs(hub5)
    del kwargs["net_arch"]
    model = PPO(WithoutLayers, small_env(), n_steps=16, batch_size=16, policy_kwargs=kwargs)
    model.learn(1, callback=PathwayCallback())


@pytest.mark.parametrize(
    ("name", "net_arch"), [("ppo", [64]), ("dqn", [64]), ("sac", {"pi": [], "qf": [8]})]
)
def test_layers_that_were_chosen(name: str, net_arch: Any, hub5: Path) -> None:
    model = make_agent(name, hub5, policy={"net_arch": net_arch})
    model.learn(1, callback=PathwayCallback())


def test_a_model_without_a_hub() -> None:
    model = PPO("CnnPolicy", small_env(), n_steps=16, batch_size=16)
    with pytest.raises(ValueError, match="PathwayCallback needs a model whose features_extractor"):
        model.learn(32, callback=PathwayCallback())
