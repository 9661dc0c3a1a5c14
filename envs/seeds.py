"""Seeds of episodes: where one begins follows from run, environment and episode alone."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


def episode_seed(seed: int, env_index: int, episode: int) -> int:
    """
    The seed, 0..2^31-1, from which one episode of one environment of a run starts.

    :param seed: seed of the run, 0 or more
    :param env_index: the environment's place in its VecEnv
    :param episode: number of the episode in that environment, from 0
    """
    state = np.random.SeedSequence((seed, env_index, episode)).generate_state(1)
    return int(state[0] >> 1)


def check_seed(seed: int) -> None:
    """
    Refuse a seed from which no episode can start.

    :raises ValueError: if ``seed`` is negative
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}, but a seed is 0 or more")


class EpisodeSeeds(gym.Wrapper[Any, Any, Any, Any]):
    """
    Starts every episode from ``episode_seed``, so that any of them can be played again.

    :param env: the environment
    :param seed: seed of the run
    :param env_index: the environment's place in its VecEnv
    """

    def __init__(self, env: gym.Env[Any, Any], seed: int, env_index: int) -> None:
        super().__init__(env)
        self._seed = seed
        self._env_index = env_index
        self._episode = -1

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
        start = episode_seed(self._seed, self._env_index, self._episode)
        return self.env.reset(seed=start, options=options)
