"""What an agent's policy answers without randomness, as plain tensors: for graphs and students."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.qrdqn.policies import QRDQNPolicy
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.dqn.policies import DQNPolicy
from torch import Tensor

# Shape letters: B batch, C H W image, A actions or their dimensions.


class Outputs(NamedTuple):
    """A policy's answer to a batch of observations."""

    actions: Tensor
    """As ``predict`` gives them with ``deterministic=True``, (B, *shape of the action space)."""
    scores: Tensor
    """What they follow from, (B, A): logits, (mean) Q-values, or the actor's mean actions."""
    values: Tensor | None
    """
    What else there is to learn: values (B, 1), Q-values (B, A), quantiles (B, N, A), or the
    logarithm of the actions' standard deviations (B, A); None for a deterministic actor.
    """


def outputs(policy: BasePolicy, observations_BCHW: Tensor) -> Outputs:
    """
    The policy's outputs, free of noise and masks.

    :param policy: in evaluation mode, unless it learns
    :param observations_BCHW: uint8, as the environment gives them
    :raises ValueError: if the policy is recurrent
    """
    actions, scores, values = _answer(policy)(policy, observations_BCHW)
    return Outputs(_as_predicted(policy, actions), scores, values)


def check_policy(policy: BasePolicy) -> None:
    """
    :raises ValueError: if ``outputs`` can't take the policy
    """
    _answer(policy)


def has_action_values(policy: BasePolicy) -> bool:
    """Whether the scores are Q-values, of which the largest one's action is taken."""
    return isinstance(policy, (DQNPolicy, QRDQNPolicy))


_Answer = Callable[[Any, Tensor], tuple[Tensor, Tensor, Tensor | None]]


def _answer(policy: BasePolicy) -> _Answer:
    if isinstance(policy, RecurrentActorCriticPolicy):
        raise ValueError(
            "a recurrent agent can't be exported: its actions follow from a state beside the "
            "observation; export an agent of another algorithm"
        )
    if isinstance(policy, (ActorCriticPolicy, MaskableActorCriticPolicy)):
        return _actor_critic
    if isinstance(policy, DQNPolicy):
        return _q_values
    return _quantiles if isinstance(policy, QRDQNPolicy) else _actor


def _actor_critic(policy: Any, observations_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    features = policy.extract_features(observations_BCHW)
    pi, vf = (features, features) if policy.share_features_extractor else features
    scores_BA = policy.action_net(policy.mlp_extractor.forward_actor(pi))
    values = policy.value_net(policy.mlp_extractor.forward_critic(vf))
    return _most_probable(policy.action_space, scores_BA), scores_BA, values


def _q_values(policy: Any, observations_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q_values_BA = policy.q_net(observations_BCHW)
    return q_values_BA.argmax(dim=1), q_values_BA, q_values_BA


def _quantiles(policy: Any, observations_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    quantiles_BNA = policy.quantile_net(observations_BCHW)
    q_values_BA = quantiles_BNA.mean(dim=1)
    return q_values_BA.argmax(dim=1), q_values_BA, quantiles_BNA


def _actor(policy: Any, observations_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of SAC and its like, or of TD3 and DDPG, whose actor gives the actions themselves."""
    actor = policy.actor
    if not hasattr(actor, "get_action_dist_params"):
        actions_BA = actor(observations_BCHW)
        return actions_BA, actions_BA, None
    mean_BA, log_std_BA, _ = actor.get_action_dist_params(observations_BCHW)
    return mean_BA.tanh(), mean_BA.tanh(), log_std_BA


def _most_probable(space: spaces.Space[Any], scores_BA: Tensor) -> Tensor:
    """The distribution's mode, without SB3's distribution: its checks can't be traced."""
    if isinstance(space, spaces.Discrete):
        return scores_BA.argmax(dim=1)
    if isinstance(space, spaces.MultiDiscrete):
        parts = torch.split(scores_BA, space.nvec.tolist(), dim=1)
        return torch.stack([part.argmax(dim=1) for part in parts], dim=1)
    return (scores_BA > 0).float() if isinstance(space, spaces.MultiBinary) else scores_BA


def _as_predicted(policy: BasePolicy, actions: Tensor) -> Tensor:
    """What SB3's ``predict`` does to a policy's actions."""
    space = policy.action_space
    actions = actions.reshape(-1, *(space.shape or ()))
    if not isinstance(space, spaces.Box):
        return actions
    low, high = (actions.new_tensor(bound) for bound in (space.low, space.high))
    if policy.squash_output:
        return low + 0.5 * (actions + 1.0) * (high - low)
    return actions.clamp(low, high)
