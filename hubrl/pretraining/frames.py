"""Frames of play: a bounded store of single frames, and the player that fills it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv

CHAPTER = 2_000  # steps of play that follow from one seed

#: Actions (n_envs,) for observations (n_envs, C, H, W).
Policy = Callable[[np.ndarray], np.ndarray]


class Places(NamedTuple):
    """Where samples lie in a ``FrameStore``: step and environment of each, (N,) int64."""

    steps: np.ndarray
    envs: np.ndarray

    def later(self, n_steps: int | np.ndarray) -> Places:
        """The same environments some steps later."""
        return Places(self.steps + n_steps, self.envs)


class FrameStore:
    """
    The last frames of several environments that step together; one frame is kept only once.

    A stack of frames is put together when it is read: zeros before the first frame of an episode,
    as SB3's ``VecFrameStack`` has them.

    :param n_steps: steps that are kept; older ones are overwritten
    :param n_envs: environments
    :param image_size: (height, width) of a frame, in pixels
    :param frame_stack: frames of an observation
    """

    def __init__(
        self, n_steps: int, n_envs: int, image_size: tuple[int, int], frame_stack: int = 4
    ) -> None:
        self.n_envs = n_envs
        self._frame_stack = frame_stack
        self._images = np.zeros((n_steps, n_envs, *image_size), dtype=np.uint8)
        self._ages = np.zeros((n_steps, n_envs), dtype=np.int64)  # steps since the episode began
        self._actions = np.zeros((n_steps, n_envs), dtype=np.int64)
        self._rewards = np.zeros((n_steps, n_envs), dtype=np.float32)
        self._begin = self._end = 0

    def clear(self, begin: int = 0) -> None:
        """Forget everything; the next step that is added has the number ``begin``."""
        self._begin = self._end = begin

    def add(
        self, images: np.ndarray, ages: np.ndarray, actions: np.ndarray, rewards: np.ndarray
    ) -> None:
        """
        Append one step.

        :param images: (n_envs, H, W) uint8, the newest frame of the observation
        :param ages: (n_envs,), steps since the episode began: 0 for its first observation
        :param actions: (n_envs,), what was done at this observation
        :param rewards: (n_envs,), what followed
        """
        row = self._end % len(self._images)
        self._images[row], self._ages[row] = images, ages
        self._actions[row], self._rewards[row] = actions, rewards
        self._end += 1
        self._begin = max(self._begin, self._end - len(self._images))

    @property
    def n_steps(self) -> int:
        """Number of the next step: how many have been added since the run began."""
        return self._end

    def sample(self, rng: np.random.Generator, n: int, ahead: int) -> Places:
        """
        Uniform places of which ``ahead`` later steps are known, too; of any episode.

        :param n: how many places
        :param ahead: steps
        """
        first, last = self._begin + self._frame_stack - 1, self._end - ahead
        assert first < last, (first, last)
        return Places(rng.integers(first, last, n), rng.integers(0, self.n_envs, n))

    def sample_pairs(self, rng: np.random.Generator, offsets: np.ndarray) -> Places:
        """
        Uniform places from which the same episode goes on for ``offsets`` steps at least.

        :param offsets: (N,) int64
        """
        places = self.sample(rng, len(offsets), int(offsets.max()) + 1)
        while True:
            redo = np.flatnonzero(~self._same_episode(places, offsets))
            if not len(redo):
                return places
            again = self.sample(rng, len(redo), int(offsets.max()) + 1)
            places.steps[redo], places.envs[redo] = again

    def observations(self, places: Places) -> np.ndarray:
        """The frame stacks at these places, newest last: (N, frame_stack, H, W) uint8."""
        back = np.arange(1 - self._frame_stack, 1)
        rows = (places.steps[:, None] + back) % len(self._images)
        images: np.ndarray = self._images[rows, places.envs[:, None]]
        images[self._at(self._ages, places)[:, None] < -back] = 0
        return images

    def actions(self, places: Places) -> np.ndarray:
        """What was done at these places: (N,) int64."""
        return self._at(self._actions, places)

    def next_rewards(self, places: Places, n_steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Rewards of the next steps and whether they belong to the same episode; (N, n_steps)."""
        ahead = np.arange(n_steps)
        steps = Places(places.steps[:, None] + ahead, places.envs[:, None])
        return self._at(self._rewards, steps), self._at(self._ages, steps) >= ahead

    def _same_episode(self, places: Places, offsets: np.ndarray) -> np.ndarray:
        same: np.ndarray = self._at(self._ages, places.later(offsets)) >= offsets
        return same

    def _at(self, values: np.ndarray, places: Places) -> np.ndarray:
        found: np.ndarray = values[places.steps % len(values), places.envs]
        return found


class Player:
    """
    Plays one game into a store of frames.

    Play is a function of the seed and the step, chapter by chapter; so a resumed run plays the
    frames that its store held again, and no others.

    :param env: the game: stacks of grey frames (C, H, W) as observations, discrete actions
    :param seed: a number, or several, from which this game's play follows
    :param n_kept: steps that the store keeps
    :param policy: chooses actions from observations; None: random play
    """

    def __init__(
        self, env: VecEnv, seed: Sequence[int], n_kept: int, policy: Policy | None = None
    ) -> None:
        assert isinstance(env.action_space, gym.spaces.Discrete)
        assert env.observation_space.shape is not None
        frame_stack, *size = env.observation_space.shape
        self.n_actions = int(env.action_space.n)
        self.frames = FrameStore(n_kept, env.num_envs, (size[0], size[1]), frame_stack)
        self._env = env
        self._seed = tuple(seed)
        self._n_kept = n_kept
        self._policy = policy
        # Random play that holds a key for a while gets further than a new action at each step.
        self._persistence = np.resize([0.0, 0.5, 0.75, 0.9], env.num_envs)

    def play_until(self, n_steps: int) -> None:
        """Play on until so many steps have been played since the run began."""
        begin = max(0, n_steps - self._n_kept) // CHAPTER * CHAPTER
        if self.frames.n_steps < begin:
            self.frames.clear(begin)
        while self.frames.n_steps < n_steps:
            if self.frames.n_steps % CHAPTER == 0:
                self._begin_chapter(self.frames.n_steps // CHAPTER)
            self._step()

    def _begin_chapter(self, chapter: int) -> None:
        sequence = np.random.SeedSequence((*self._seed, chapter))
        self._rng = np.random.default_rng(sequence)
        self._env.seed(int(sequence.generate_state(1)[0]))
        observations = self._env.reset()
        assert isinstance(observations, np.ndarray)
        self._observations = observations
        self._ages = np.zeros(self._env.num_envs, dtype=np.int64)
        self._actions = self._rng.integers(0, self.n_actions, self._env.num_envs)

    def _step(self) -> None:
        self._choose_actions()
        images = self._observations[:, -1]
        observations, rewards, dones, _ = self._env.step(self._actions)
        assert isinstance(observations, np.ndarray)
        self._observations = observations
        self.frames.add(images, self._ages, self._actions, rewards)
        self._ages = np.where(dones, 0, self._ages + 1)

    def _choose_actions(self) -> None:
        """An agent's actions, some of them replaced; or random ones, each held for a while."""
        random = self._rng.integers(0, self.n_actions, self._env.num_envs)
        draws = self._rng.random(self._env.num_envs)
        if self._policy is None:
            self._actions = np.where(draws < self._persistence, self._actions, random)
        else:
            best = self._policy(self._observations)
            self._actions = np.where(draws < self._persistence / 2, random, best)
