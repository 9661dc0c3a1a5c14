"""Action masks: an environment's own, or all actions allowed."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.vec_env import DummyVecEnv

from envs import AtariVecEnv, make_vec_env, with_action_masks


def test_masks_of_an_environment_are_its_own() -> None:
    env = make_vec_env("hubrl/TinyImage-v0", 3)
    assert with_action_masks(env) is env
    env.reset()
    assert get_action_masks(env).sum(axis=1).tolist() == [3, 3, 3]


def test_atari_has_all_actions_allowed() -> None:
    plain = AtariVecEnv("ALE/Breakout-v5", 2)
    assert not is_masking_supported(plain)
    env = with_action_masks(plain)
    assert is_masking_supported(env)
    assert get_action_masks(env).tolist() == [[True] * 4] * 2
    assert env.get_attr("env_id") == ["ALE/Breakout-v5"] * 2
    assert env.reset().shape == (2, 4, 84, 84)
    env.step_async(np.array([1, 1]))
    observations, _, dones, _ = env.step_wait()
    assert observations.shape == (2, 4, 84, 84)
    assert not dones.any()
    env.close()


class Still(gym.Env):
    """Nothing happens in it."""

    observation_space = gym.spaces.Box(0, 1, (1,))

    def __init__(self, actions: gym.Space) -> None:
        self.action_space = actions

    def beep(self, times: int) -> str:
        return "beep" * times


@pytest.mark.parametrize(
    ("actions", "n"),
    [
        (gym.spaces.Discrete(5), 5),
        (gym.spaces.MultiDiscrete([2, 3]), 5),
        (gym.spaces.MultiBinary(3), 6),
    ],
)
def test_a_mask_for_each_choice(actions: gym.Space, n: int) -> None:
    env = with_action_masks(DummyVecEnv([lambda: Still(actions)] * 2))
    assert get_action_masks(env).tolist() == [[True] * n] * 2
    assert env.env_method("beep", 2) == ["beepbeep"] * 2
