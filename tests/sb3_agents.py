"""Agents of every algorithm that hubrl knows, as a user's own script builds them: untouched SB3."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sb3_contrib import QRDQN, TQC, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.envs import FakeImageEnv
from torch import Tensor, nn

import hubrl


class Agent(NamedTuple):
    """How a small agent of an algorithm is made."""

    model: type[BaseAlgorithm]
    settings: dict[str, Any]
    policy: str = "CnnPolicy"
    policy_kwargs: Mapping[str, Any] = {}
    is_continuous: bool = False


REPLAY = {"buffer_size": 64, "learning_starts": 8, "batch_size": 8, "train_freq": 4}
ROLLOUT = {"n_steps": 32, "batch_size": 16, "n_epochs": 2}
SMALL_NETS = {"net_arch": [8]}

ON_POLICY: dict[str, Agent] = {
    "ppo": Agent(PPO, ROLLOUT),
    "a2c": Agent(A2C, {"n_steps": 8}),
    "maskable_ppo": Agent(MaskablePPO, ROLLOUT),
    "recurrent_ppo": Agent(RecurrentPPO, ROLLOUT, "CnnLstmPolicy", {"lstm_hidden_size": 8}),
}
OFF_POLICY: dict[str, Agent] = {
    "dqn": Agent(DQN, REPLAY),
    "qrdqn": Agent(QRDQN, REPLAY, "CnnPolicy", {"n_quantiles": 10}),
    "sac": Agent(SAC, REPLAY, "CnnPolicy", SMALL_NETS, True),
    "td3": Agent(TD3, REPLAY | {"policy_delay": 1}, "CnnPolicy", SMALL_NETS, True),
    "ddpg": Agent(DDPG, REPLAY, "CnnPolicy", SMALL_NETS, True),
    "tqc": Agent(TQC, REPLAY, "CnnPolicy", SMALL_NETS | {"n_quantiles": 5}, True),
    "crossq": Agent(CrossQ, REPLAY | {"policy_delay": 1}, "MlpPolicy", SMALL_NETS, True),
}
AGENTS = ON_POLICY | OFF_POLICY


class MaskedImageEnv(FakeImageEnv):
    """The same with a method that MaskablePPO asks; all actions are allowed."""

    def action_masks(self) -> list[bool]:
        return [True] * int(self.action_space.n)


def make_agent(
    name: str,
    hub: Path | str,
    settings: dict[str, Any] | None = None,
    *,
    policy: dict[str, Any] | None = None,
    device: str = "cpu",
    **extractor: Any,
) -> BaseAlgorithm:
    """
    An agent on random images of (4, 36, 36) with the bare extractor, in float32 unless told.

    :param settings: of the algorithm; they win over its small ones
    :param policy: arguments of the policy; they win over its small ones
    :param extractor: arguments of HubFeaturesExtractor
    """
    agent = AGENTS[name]
    env_class = MaskedImageEnv if name == "maskable_ppo" else FakeImageEnv
    env = env_class(
        screen_height=36,
        screen_width=36,
        n_channels=4,
        discrete=not agent.is_continuous,
        channel_first=True,
    )
    env.observation_space.seed(3)
    policy_kwargs = {
        "features_extractor_class": hubrl.HubFeaturesExtractor,
        "features_extractor_kwargs": {"hub": str(hub), "precision": "float32", **extractor},
        "net_arch": [],
        **agent.policy_kwargs,
        **(policy or {}),
    }
    return agent.model(
        agent.policy,
        env,
        seed=0,
        device=device,
        policy_kwargs=policy_kwargs,
        **{**agent.settings, **(settings or {})},
    )


def extractors_of(model: BaseAlgorithm) -> list[hubrl.HubFeaturesExtractor]:
    """All that the algorithm built, each once, targets among them."""
    modules = model.policy.modules()
    return [module for module in modules if isinstance(module, hubrl.HubFeaturesExtractor)]


def learning_extractors(model: BaseAlgorithm) -> list[hubrl.HubFeaturesExtractor]:
    """Those that are in an optimizer."""
    learned = {id(p) for _, part in optimizers_of(model).items() for p in parameters_of(part)}
    targets = ("q_net_target", "quantile_net_target", "actor_target", "critic_target")
    behind = {
        id(module)
        for name in targets
        if hasattr(model.policy, name)
        for module in getattr(model.policy, name).modules()
    }
    return [
        extractor
        for extractor in extractors_of(model)
        if id(extractor) not in behind and any(id(p) in learned for p in extractor.parameters())
    ]


def optimizers_of(model: BaseAlgorithm) -> dict[str, Any]:
    """The optimizers of networks, by where they lie."""
    if hasattr(model.policy, "actor") and hasattr(model.policy, "critic"):
        return {
            "actor": model.policy.actor.optimizer,
            "critic": model.policy.critic.optimizer,
        }
    return {"policy": model.policy.optimizer}


def parameters_of(optimizer: Any) -> list[Any]:
    """Flat list of an optimizer's parameters."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def spread_scores(model: BaseAlgorithm) -> None:
    """Scores and noise that differ much between images, as after some learning."""
    torch.manual_seed(5)
    for extractor in extractors_of(model):
        for head in (extractor.pathway.generator.scores, extractor.pathway.generator.noise_scale):
            nn.init.normal_(head.weight, std=0.3)


class FirstMinibatch:
    """
    Records |ratio - 1| of each iteration's first minibatch, rows of padding left out.

    ``n_padding`` counts these rows in all minibatches.
    """

    def __init__(self, model: BaseAlgorithm) -> None:
        self.errors: list[float] = []
        self.n_padding = 0
        self._log_prob: Tensor | None = None
        self._get, self._evaluate = model.rollout_buffer.get, model.policy.evaluate_actions
        model.rollout_buffer.get = self.get
        model.policy.evaluate_actions = self.evaluate
        self._is_first = True

    def get(self, batch_size: int | None = None) -> Any:
        for data in self._get(batch_size):
            yield data
            is_real_B = getattr(data, "mask", torch.ones_like(data.old_log_prob)) > 0
            self.n_padding += int((~is_real_B).sum())
            if self._is_first:
                assert self._log_prob is not None
                errors_B = (self._log_prob - data.old_log_prob).exp().sub(1).abs()
                self.errors.append(errors_B[is_real_B].max().item())
                self._is_first = False

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        values, log_prob, entropy = self._evaluate(*args, **kwargs)
        self._log_prob = log_prob.detach()
        return values, log_prob, entropy

    def next(self) -> None:
        self._is_first = True
