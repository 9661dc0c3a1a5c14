"""Where the environments of a run stand, as arrays; by replay others are led there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnv

from envs.atari import AtariVecEnv
from envs.episodes import recorded_episodes, replay


def env_state(env: VecEnv) -> Callable[[], dict[str, np.ndarray]]:
    """
    Where the environments stand: seeds, and the actions since.

    :param env: of ``make_vec_env``
    :return: a function that makes the arrays, also when the environments have gone on
    """
    base = env.unwrapped
    if isinstance(base, AtariVecEnv):
        return base.state()
    assert isinstance(base, DummyVecEnv), base
    states = [recorded_episodes(each).state() for each in base.envs]
    return lambda: {
        f"{i}.{key}": array for i, state in enumerate(states) for key, array in state().items()
    }


def restore_env(env: VecEnv, state: Mapping[str, np.ndarray]) -> np.ndarray:
    """
    Lead the environments to where others stood.

    :param env: made in the same way
    :param state: the arrays of ``env_state``
    :return: observations there; they are those of before if episodes follow from seeds and actions
    """
    base = env.unwrapped
    if isinstance(base, AtariVecEnv):
        return base.restore(state)
    assert isinstance(base, DummyVecEnv), base
    return np.stack(
        [
            replay(each, {key: state[f"{i}.{key}"] for key in ("seed", "episode", "actions")})
            for i, each in enumerate(base.envs)
        ]
    )
