"""
Environments as Stable-Baselines3 VecEnvs of images: ``make_vec_env`` makes any of them.

For tests there are two tiny image environments (solved by a CNN policy in seconds, random return 2,
best 8): ``"hubrl/TinyImage-v0"`` (4 discrete actions, with ``action_masks``) and
``"hubrl/TinyImageContinuous-v0"`` (2 continuous actions). Importing ``envs`` registers both.
"""

import gymnasium as gym

from envs.atari import AtariVecEnv
from envs.episodes import EnvironmentFaultError
from envs.images import ImageFormat, make_vec_env
from envs.masks import with_action_masks
from envs.seeds import episode_seed
from envs.states import env_state, restore_env

__all__ = [
    "AtariVecEnv",
    "EnvironmentFaultError",
    "ImageFormat",
    "env_state",
    "episode_seed",
    "make_vec_env",
    "restore_env",
    "with_action_masks",
]

gym.register("hubrl/TinyImage-v0", "envs.tiny:TinyImage")
gym.register("hubrl/TinyImageContinuous-v0", "envs.tiny:TinyImage", kwargs={"continuous": True})
