"""Action masks for environments that have none of their own."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env.base_vec_env import VecEnv, VecEnvIndices, VecEnvWrapper

METHOD = "action_masks"  # where sb3-contrib's MaskablePPO looks for them


def with_action_masks(env: VecEnv) -> VecEnv:
    """
    The environments with masks for sb3-contrib's MaskablePPO: their own, or all actions allowed.

    :param env: Discrete, MultiDiscrete or MultiBinary actions
    """
    return env if env.has_attr(METHOD) else AllActionsAllowed(env)


class AllActionsAllowed(VecEnvWrapper):
    """
    Environments in which each action is allowed at each step.

    :param venv: Discrete, MultiDiscrete or MultiBinary actions
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self._mask = np.ones(_n_choices(venv.action_space), dtype=bool)

    def action_masks(self) -> np.ndarray:
        """The mask of one environment, all true."""
        return self._mask

    def reset(self) -> Any:
        """As without masks."""
        return self.venv.reset()

    def step_wait(self) -> Any:
        """As without masks."""
        return self.venv.step_wait()

    def has_attr(self, attr_name: str) -> bool:
        """The masks' method, or what the environments have."""
        return attr_name == METHOD or self.venv.has_attr(attr_name)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The masks' method for each index, or what the environments have."""
        if attr_name == METHOD:
            return [self.action_masks for _ in self._get_indices(indices)]
        return self.venv.get_attr(attr_name, indices)

    def env_method(
        self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any
    ) -> list[Any]:
        """A mask for each index, or what the environments answer."""
        if method_name == METHOD:
            return [self.action_masks() for _ in self._get_indices(indices)]
        return self.venv.env_method(method_name, *args, indices=indices, **kwargs)


def _n_choices(actions: gym.Space[Any]) -> int:
    if isinstance(actions, gym.spaces.MultiDiscrete):
        return int(actions.nvec.sum())
    if isinstance(actions, gym.spaces.MultiBinary):
        return 2 * int(np.prod(actions.shape))
    assert isinstance(actions, gym.spaces.Discrete), actions
    return int(actions.n)
