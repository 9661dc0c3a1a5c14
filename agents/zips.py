"""Agents that SB3 saved as a zip, rebuilt from tensors and plain data alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import VecEnv

from agents.algorithms import ALGORITHMS
from hubrl.extractor import HubFeaturesExtractor
from hubrl.providers import agent_data, policy_tensors

#: Names of SB3's policies for images, where it is not CnnPolicy.
POLICIES = {"crossq": "MlpPolicy", "recurrent_ppo": "CnnLstmPolicy"}
#: Arguments of a policy that decide its layers and are plain data.
PLAIN = ("net_arch", "share_features_extractor", "n_quantiles", "n_critics", "lstm_hidden_size")


def hub_of(file: Path) -> str:
    """
    The hub of a saved agent, or ``none`` for SB3's own NatureCNN.

    :raises ValueError: if it is no agent that SB3 saved, or has another features extractor
    """
    return str(_extractor_kwargs(file).get("hub", "atari5")) if _has_hub(file) else "none"


def rebuild(file: Path, algorithm: str, env: VecEnv) -> BaseAlgorithm:
    """
    The agent in a zip, built anew with its weights; SB3's own loader would run what is pickled.

    For playing: hyperparameters, optimizer and replay buffer stay behind.

    :param file: what ``model.save`` wrote
    :param algorithm: a key of ``agents.algorithms.ALGORITHMS``; the zip doesn't say
    :param env: with the spaces that the agent was trained with
    :raises ValueError: if the file, the algorithm and the environment don't fit each other
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algo is {algorithm!r}, allowed: {', '.join(ALGORITHMS)}")
    given = _policy_kwargs(file)
    kwargs = {name: given[name] for name in PLAIN if name in given}
    if _has_hub(file):
        kwargs["features_extractor_class"] = HubFeaturesExtractor
        kwargs["features_extractor_kwargs"] = _extractor_kwargs(file)
    agent = ALGORITHMS[algorithm].model
    settings: dict[str, Any] = {"buffer_size": 1} if issubclass(agent, OffPolicyAlgorithm) else {}
    try:
        policy = POLICIES.get(algorithm, "CnnPolicy")
        model: BaseAlgorithm = agent(policy, env, policy_kwargs=kwargs, **settings)
        model.policy.load_state_dict(policy_tensors(file))
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file} does not fit algo {algorithm!r} and this env: {reason}") from None
    return model


def _has_hub(file: Path) -> bool:
    name = _policy_kwargs(file).get("features_extractor_class", str(NatureCNN))
    if name not in (str(HubFeaturesExtractor), str(NatureCNN)):
        raise ValueError(
            f"{file} has the features extractor {name}, allowed: HubFeaturesExtractor, NatureCNN"
        )
    return bool(name == str(HubFeaturesExtractor))


def _extractor_kwargs(file: Path) -> dict[str, Any]:
    kwargs = _policy_kwargs(file).get("features_extractor_kwargs", {})
    if not isinstance(kwargs, dict):
        raise ValueError(f"{file}: features_extractor_kwargs must be plain data: names and numbers")
    return kwargs


def _policy_kwargs(file: Path) -> Mapping[str, Any]:
    """What SB3 wrote of them beside their pickle."""
    kwargs = agent_data(file).get("policy_kwargs")
    return kwargs if isinstance(kwargs, dict) else {}
