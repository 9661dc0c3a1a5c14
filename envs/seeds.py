"""Seeds of episodes: where one begins follows from run, environment and episode alone."""

from __future__ import annotations

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
