"""``RecordedEpisodes``: each begins from a seed of its own and can be played again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from envs.seeds import episode_seed


class RecordedEpisodes(gym.Wrapper[Any, Any, Any, Any]):
    """
    Starts every episode from ``episode_seed`` and keeps its actions.

    :param env: the environment
    :param seed: seed of the run
    :param env_index: the environment's place in its VecEnv
    """

    def __init__(self, env: gym.Env[Any, Any], seed: int, env_index: int) -> None:
        super().__init__(env)
        self._seed = seed
        self._env_index = env_index
        self._episode = -1
        self._actions: list[Any] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """
        Start the next episode.

        :param seed: a run's seed plus ``env_index``, as DummyVecEnv hands it down after its own
            ``seed``; episodes then count from 0 again
        """
        if seed is not None:
            self._seed = seed - self._env_index
            self._episode = -1
        self._episode += 1
        self._actions = []
        start = episode_seed(self._seed, self._env_index, self._episode)
        return self.env.reset(seed=start, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step."""
        self._actions.append(np.array(action))
        return self.env.step(action)

    def state(self) -> Callable[[], dict[str, np.ndarray]]:
        """Where it stands now, in arrays, which are made when they are asked for."""
        seed, episode = self._seed, self._episode
        actions, n_steps = self._actions, len(self._actions)
        return lambda: {
            "seed": np.array(seed),
            "episode": np.array(episode),
            "actions": np.array(actions[:n_steps]),
        }


def replay(env: gym.Env[Any, Any], state: Mapping[str, np.ndarray]) -> Any:
    """
    Play an episode again, up to where it stood.

    :param env: with ``RecordedEpisodes`` among its wrappers
    :param state: what ``RecordedEpisodes.state`` gave
    :return: the observation there
    """
    recorded = recorded_episodes(env)
    recorded._seed, recorded._episode = int(state["seed"]), int(state["episode"]) - 1
    observation, _ = env.reset()
    for action in state["actions"]:
        observation, *_ = env.step(action)
    return observation


def recorded_episodes(env: gym.Env[Any, Any]) -> RecordedEpisodes:
    """The wrapper among an environment's wrappers."""
    while not isinstance(env, RecordedEpisodes):
        assert isinstance(env, gym.Wrapper), env
        env = env.env
    return env
