"""Agents of a user's own script: rebuilt from their zip without its pickles, and played."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sb3_agents import AGENTS, make_agent
from small_runs import SMALL_OF, small_env
from stable_baselines3 import PPO

import hubrl.evaluate
from agents.zips import hub_of, rebuild
from envs import with_action_masks


def env_of(name: str) -> Any:
    return (
        with_action_masks(small_env(algorithm=name))
        if "maskable" in name
        else small_env(algorithm=name)
    )


@pytest.mark.parametrize("name", AGENTS)
def test_every_algorithms_agent_acts_as_before(name: str, hub5: Path, tmp_path: Path) -> None:
    # Its own environment has other actions than TinyImage's: build it on that.
    agent = AGENTS[name]
    kwargs = {
        "features_extractor_class": hubrl.HubFeaturesExtractor,
        "features_extractor_kwargs": {"hub": str(hub5), "precision": "float32", "freeze": ["a"]},
        "net_arch": [],
        **agent.policy_kwargs,
    }
    env = env_of(name)
    model = agent.model(agent.policy, env, policy_kwargs=kwargs, seed=0, **agent.settings)
    model.learn(64)
    model.save(tmp_path / "own.zip")
    assert hub_of(tmp_path / "own.zip") == str(hub5)
    again = rebuild(tmp_path / "own.zip", name, env)
    images = np.random.default_rng(0).integers(256, size=(8, 4, 36, 36)).astype(np.uint8)
    expected, _ = model.predict(images, deterministic=True)
    np.testing.assert_array_equal(again.predict(images, deterministic=True)[0], expected)


def test_the_command_plays_a_zip(
    hub5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env_id = SMALL_OF["ppo"].get("env.id", "hubrl/TinyImage-v0")
    kwargs = {
        "features_extractor_class": hubrl.HubFeaturesExtractor,
        "features_extractor_kwargs": {"hub": str(hub5), "precision": "float32"},
        "net_arch": [],
    }
    PPO("CnnPolicy", small_env(), policy_kwargs=kwargs, seed=0).save(tmp_path / "own.zip")
    arguments = [str(tmp_path / "own.zip"), "--env", env_id, "--episodes", "3"]
    hubrl.evaluate.command.main(arguments, standalone_mode=False)
    assert "own.zip, 3 games: mean return" in capsys.readouterr().out
    with pytest.raises(Exception, match="doesn't say where its agent plays: give --env"):
        hubrl.evaluate.command.main(arguments[:1], standalone_mode=False)


def test_what_does_not_fit(hub5: Path, tmp_path: Path) -> None:
    make_agent("ppo", hub5).save(tmp_path / "own.zip")
    with pytest.raises(ValueError, match="algo is 'pppo', allowed: ppo, a2c"):
        rebuild(tmp_path / "own.zip", "pppo", small_env())
    with pytest.raises(ValueError, match=r"own\.zip does not fit algo 'dqn' and this env: "):
        rebuild(tmp_path / "own.zip", "dqn", small_env())
    plain = PPO("CnnPolicy", small_env())
    plain.save(tmp_path / "plain.zip")
    assert hub_of(tmp_path / "plain.zip") == "none"
    (tmp_path / "no.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="is no agent saved by Stable-Baselines3"):
        hub_of(tmp_path / "no.zip")
