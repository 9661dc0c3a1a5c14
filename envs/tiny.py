"""Two tiny image environments that a CNN policy solves in seconds; they serve the tests."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

EPISODE_STEPS = 8


class TinyImage(gym.Env[np.ndarray, Any]):
    """
    A bright square lies in one of four quadrants; naming its quadrant earns 1, anything else 0.

    The quadrant is drawn anew after each of the 8 steps of an episode, so random play has a return
    of 2 and perfect play one of 8. The continuous version takes a point (x, y) in -1..1: the
    quadrant is given by the two signs.

    :param size: height and width of the (size, size, 3) uint8 image, in pixels
    :param continuous: take a point instead of a quadrant's number
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012 (Gymnasium's own)

    def __init__(
        self, size: int = 36, continuous: bool = False, render_mode: str | None = None
    ) -> None:
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = (
            gym.spaces.Box(-1.0, 1.0, (2,), np.float32) if continuous else gym.spaces.Discrete(4)
        )
        self._size = size
        self._continuous = continuous
        self._steps = 0
        self._quadrant = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Draw the first quadrant; (size, size, 3) uint8."""
        super().reset(seed=seed)
        self._steps = 0
        self._draw_quadrant()
        return self.render(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Score the answer and draw the next quadrant."""
        if self._continuous:
            x, y = action
            action = 2 * int(y > 0) + int(x > 0)
        reward = float(int(action) == self._quadrant)
        self._steps += 1
        self._draw_quadrant()
        return self.render(), reward, self._steps == EPISODE_STEPS, False, {}

    def action_masks(self) -> np.ndarray:
        """(4,) bool: all answers but the opposite quadrant, for MaskablePPO."""
        return np.array([answer != 3 - self._quadrant for answer in range(4)])

    def render(self) -> np.ndarray:
        """The image itself; quadrant q has its square in row q // 2 and column q % 2."""
        image = np.zeros((self._size, self._size, 3), dtype=np.uint8)
        half, margin = self._size // 2, self._size // 8
        top, left = half * (self._quadrant // 2), half * (self._quadrant % 2)
        image[top + margin : top + half - margin, left + margin : left + half - margin] = 255
        return image

    def _draw_quadrant(self) -> None:
        self._quadrant = int(self.np_random.integers(4))
