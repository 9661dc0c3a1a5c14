"""Games that are played for an export: whose actions, what is seen, two views of one game."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from sb3_contrib.common.envs import (
    InvalidActionEnvDiscrete,
    InvalidActionEnvMultiBinary,
    InvalidActionEnvMultiDiscrete,
)
from sb3_contrib.common.maskable.utils import get_action_masks
from small_runs import small_env
from stable_baselines3.common.vec_env import DummyVecEnv

from envs import ImageFormat, make_vec_env
from hubrl.exporting.play import Games, agents_play, half_random


class Player:
    """An agent that always takes one action, and remembers what it saw."""

    action_space = spaces.Discrete(4, seed=0)

    def predict(self, observations: np.ndarray) -> tuple[np.ndarray, None]:
        self.seen = observations
        return np.full(len(observations), 3), None


def test_observations_are_those_that_were_acted_on() -> None:
    env, seen = small_env(2), []

    def act(views: list[np.ndarray]) -> np.ndarray:
        seen.append(views[0].copy())
        return np.zeros(2, dtype=np.int64)

    games = Games([env], seed=1)
    (first,) = games.play(20, act)
    (then,) = games.play(3, act)
    assert first.shape == (40, 4, 36, 36)
    np.testing.assert_array_equal(np.concatenate([first, then]), np.concatenate(seen))
    (again,) = Games([env], seed=1).play(20, act)
    np.testing.assert_array_equal(first, again)
    assert (Games([env], seed=2).play(20, act)[0] != first).any()


def test_two_views_show_the_same_games() -> None:
    large = make_vec_env("hubrl/TinyImage-v0", 2, image=ImageFormat(size=72, stack=1))
    player: Any = Player()
    small_images, large_images = Games([small_env(2), large], seed=0).play(
        20, agents_play(player, -1)
    )
    assert player.seen.shape == (2, 1, 72, 72)
    np.testing.assert_array_equal(small_images[:, -1], large_images[:, 0, ::2, ::2])


def test_games_that_part_are_refused() -> None:
    env, other = small_env(2), small_env(2)
    games = Games([env, other], seed=0)
    other.seed(1)
    other.reset()
    with pytest.raises(ValueError, match="the same seeds and actions gave two different games"):
        games.play(50, lambda views: np.zeros(2, dtype=np.int64))


def test_every_second_game_is_random() -> None:
    player: Any = Player()
    act = half_random(player)
    actions = np.array([act([np.zeros((4, 1))]) for _ in range(50)])
    assert (actions[:, 1::2] == 3).all()
    assert set(actions[:, ::2].flat) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("game", "widths"),
    [
        (partial(InvalidActionEnvDiscrete, 6, n_invalid_actions=3), [6]),
        (partial(InvalidActionEnvMultiDiscrete, [4, 3], n_invalid_actions=3), [4, 3]),
        (partial(InvalidActionEnvMultiBinary, 3, n_invalid_actions=2), [2, 2, 2]),
    ],
)
def test_masked_actions_are_not_played(game: Any, widths: list[int]) -> None:
    agent = MaskablePPO("MlpPolicy", DummyVecEnv([game] * 4), seed=0)
    env = agent.get_env()
    assert env is not None
    starts, seen = np.cumsum([0, *widths[:-1]]), set()
    for act in (half_random(agent), agents_play(agent, 0)):
        observations: Any = env.reset()
        for _ in range(50):
            actions = act([observations])
            places = starts + actions.reshape(4, -1)
            assert np.take_along_axis(get_action_masks(env), places, axis=1).all()
            seen.update(map(tuple, places.tolist()))
            observations, *_ = env.step(actions)
    assert len(seen) >= 6
