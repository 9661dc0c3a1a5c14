"""``RecordedEpisodes``: each begins from its own seed, can be repeated, and tells its faults."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import gymnasium as gym
import numpy as np

from envs.seeds import episode_seed


class EnvironmentFaultError(Exception):
    """
    An environment raised, hung, or gave something else than its spaces say.

    :param fault: what it did
    :param record: plain data by which it does so again: ``env_index``, the run's ``seed``,
        ``episode``, ``episode_seed`` for ``reset``, and the ``actions`` after it
    """

    def __init__(self, fault: str, record: dict[str, Any]) -> None:
        super().__init__(
            f"environment {record['env_index']} {fault}, {len(record['actions'])} actions after "
            f"reset(seed={record['episode_seed']}), in its episode {record['episode']} of a run "
            f"with seed {record['seed']}"
        )
        self.record = {"fault": fault, **record}


class RecordedEpisodes(gym.Wrapper[Any, Any, Any, Any]):
    """
    Starts every episode from ``episode_seed``, keeps its actions, and names what goes wrong in it.

    A time limit holds in the main thread alone, where Python gets signals, and ends what waits or
    computes in Python; a library that never returns to Python is beyond it.

    :param env: the environment
    :param seed: seed of the run
    :param env_index: the environment's place in its VecEnv
    :param timeout: seconds that a step or a reset may take; None: any
    :raises EnvironmentFaultError: from ``step`` and ``reset``, if the environment raises, is out of
        time, or gives an observation of another shape or dtype than its space, or a reward that is
        no finite number
    """

    def __init__(
        self, env: gym.Env[Any, Any], seed: int, env_index: int, timeout: float | None = None
    ) -> None:
        super().__init__(env)
        self._seed = seed
        self._env_index = env_index
        self._timeout = timeout
        self._episode = -1
        self._actions: list[np.ndarray] = []

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
        with self._watched():
            observation, info = self.env.reset(seed=self._episode_seed(), options=options)
        self._check(observation, 0.0)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One step."""
        self._actions.append(np.array(action))
        with self._watched():
            observation, reward, terminated, truncated, info = self.env.step(action)
        self._check(observation, reward)
        return observation, reward, terminated, truncated, info

    def state(self) -> Callable[[], dict[str, np.ndarray]]:
        """Where it stands now, in arrays, which are made when they are asked for."""
        seed, episode = self._seed, self._episode
        actions, n_steps = self._actions, len(self._actions)
        return lambda: {
            "seed": np.array(seed),
            "episode": np.array(episode),
            "actions": np.array(actions[:n_steps]),
        }

    def rewind(self, state: Mapping[str, np.ndarray]) -> None:
        """Have the next reset begin the episode of a state."""
        self._seed, self._episode = int(state["seed"]), int(state["episode"]) - 1

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            with time_limit(self._timeout):
                yield
        except TimeLimitError:
            raise self._fault(f"did not answer within {self._timeout:g} s (env.timeout)") from None
        except Exception as error:
            raise self._fault(f"raised {described(error)}") from error

    def _check(self, observation: Any, reward: Any) -> None:
        space = self.observation_space
        shape, dtype = np.shape(observation), getattr(observation, "dtype", type(observation))
        if (shape, dtype) != (space.shape, space.dtype):
            raise self._fault(
                f"gave an observation of {shape} {dtype} instead of {space.shape} {space.dtype}"
            )
        if not math.isfinite(reward):
            raise self._fault(f"gave the reward {reward}")

    def _fault(self, fault: str) -> EnvironmentFaultError:
        return EnvironmentFaultError(
            fault,
            {
                "env_index": self._env_index,
                "seed": self._seed,
                "episode": self._episode,
                "episode_seed": self._episode_seed(),
                "actions": [action.tolist() for action in self._actions],
            },
        )

    def _episode_seed(self) -> int:
        return episode_seed(self._seed, self._env_index, self._episode)


class TimeLimitError(BaseException):
    """No ``Exception``, which an environment may catch."""


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """
    Inside, ``TimeLimitError`` is raised once the time is over; in other threads than the main one,
    nothing.

    :param seconds: None: no limit
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeLimitError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def recorded_episodes(env: gym.Env[Any, Any]) -> RecordedEpisodes:
    """The wrapper among an environment's wrappers."""
    while not isinstance(env, RecordedEpisodes):
        assert isinstance(env, gym.Wrapper), env
        env = env.env
    return env


def replay(env: gym.Env[Any, Any], state: Mapping[str, np.ndarray]) -> Any:
    """
    Play an episode again, up to where it stood.

    :param env: with ``RecordedEpisodes`` among its wrappers
    :param state: what ``RecordedEpisodes.state`` gave
    :return: the observation there
    """
    recorded_episodes(env).rewind(state)
    observation, _ = env.reset()
    for action in state["actions"]:
        observation, *_ = env.step(action)
    return observation


def described(error: Exception) -> str:
    """An error of a stranger's code, as much of it as one reads in a line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
