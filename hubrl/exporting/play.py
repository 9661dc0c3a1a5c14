"""Play for an export: the same games, seen in the formats of one or of two agents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.distributions import make_masked_proba_distribution
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from agents.faults import policy_errors

Images = NDArray[np.uint8]
#: Actions for the observations of each view.
Act = Callable[[list[Images]], NDArray[Any]]


class Games:
    """
    Games that go on from one call to the next.

    :param views: environments of one game and one seed, which differ in their images alone
    :param seed: of the games
    """

    def __init__(self, views: Sequence[VecEnv], seed: int) -> None:
        self._views = views
        self.n_envs = views[0].num_envs
        for view in views:
            view.seed(seed)
        self._observations: list[Any] = [view.reset() for view in views]

    def play(self, n_steps: int, act: Act) -> list[Images]:
        """
        Play some steps of all games.

        :param n_steps: of each game
        :param act: gives the actions
        :return: for each view the observations that were acted on, (n_steps * n_envs, C, H, W)
        :raises ValueError: if the views don't stay together, as where a game is not deterministic
        """
        seen: list[list[Images]] = [[] for _ in self._views]
        for _ in range(n_steps):
            for images, observation in zip(seen, self._observations, strict=True):
                images.append(observation.copy())  # an environment may write into its own
            self._step(act(self._observations))
        return [np.concatenate(images) for images in seen]

    def _step(self, actions: NDArray[Any]) -> None:
        results = [view.step(actions) for view in self._views]
        self._observations = [observations for observations, *_ in results]
        _, rewards, dones, _ = results[0]
        for _, other_rewards, other_dones, _ in results[1:]:
            if (other_rewards != rewards).any() or (other_dones != dones).any():
                raise ValueError(
                    "the same seeds and actions gave two different games: the environment is not "
                    "deterministic, so teacher and student can't see the same game"
                )


def half_random(agent: BaseAlgorithm) -> Act:
    """The agent's own play, sampled as in training, but random play in every second game."""

    def act(views: list[Images]) -> NDArray[Any]:
        actions = _actions(agent, views[0])
        for i in range(0, len(actions), 2):
            actions[i] = _random_action(agent, i)
        return actions

    return act


def agents_play(agent: BaseAlgorithm, view: int) -> Act:
    """
    :param view: which of the views the agent sees
    """
    return lambda views: _actions(agent, views[view])


def _actions(agent: BaseAlgorithm, images: Images) -> NDArray[Any]:
    """Sampled, of those that are allowed."""
    masks: dict[str, Any] = {}
    if isinstance(agent, MaskablePPO):
        masks["action_masks"] = _masks(agent)
    with policy_errors(agent):
        return agent.predict(images, **masks)[0]


def _random_action(agent: BaseAlgorithm, i: int) -> NDArray[Any]:
    """Of the game i, uniform among those that are allowed."""
    if not isinstance(agent, MaskablePPO):
        action: NDArray[Any] = agent.action_space.sample()
        return action
    mask = _masks(agent)[i : i + 1]
    choice = make_masked_proba_distribution(agent.action_space)
    choice.proba_distribution(torch.zeros(mask.shape)).apply_masking(mask)
    sampled: NDArray[Any] = choice.sample().numpy()[0]
    return sampled


def _masks(agent: MaskablePPO) -> NDArray[np.bool_]:
    env = agent.get_env()
    assert env is not None
    return get_action_masks(env)
