"""Recorded episodes: where environments stand, time limits."""

from __future__ import annotations

import signal
import threading
import time

import numpy as np
import pytest

from envs import env_state, make_vec_env, restore_env
from envs.episodes import TimeLimitError, time_limit


@pytest.mark.parametrize(
    "env_id",
    ["hubrl/TinyImage-v0", "hubrl/TinyImageContinuous-v0", "ALE/Breakout-v5", "ALE/Qbert-v5"],
)
@pytest.mark.parametrize("sticky", [0.25, pytest.param(0.0, marks=pytest.mark.slow)])
def test_other_environments_are_led_there(env_id: str, sticky: float) -> None:
    if sticky and not env_id.startswith("ALE/"):
        pytest.skip("Atari alone has sticky actions")
    env = make_vec_env(env_id, 2, sticky=sticky, seed=3)
    env.action_space.seed(0)
    actions = [[env.action_space.sample() for _ in range(2)] for _ in range(250)]
    observations = env.reset()
    for action in actions[:200]:
        observations, *_ = env.step(np.array(action))
    state = env_state(env)
    expected = [env.step(np.array(action)) for action in actions[200:]]

    other = make_vec_env(env_id, 2, sticky=sticky, seed=3)
    other.reset()
    np.testing.assert_array_equal(restore_env(other, state()), observations)
    for action, before in zip(actions[200:], expected, strict=True):
        answer = other.step(np.array(action))
        for array, array_before in zip(answer[:3], before[:3], strict=True):
            np.testing.assert_array_equal(array, array_before)
        assert str(answer[3]).split("'t'")[0] == str(before[3]).split("'t'")[0]


def test_games_that_do_not_replay_show_where_they_are() -> None:
    env = make_vec_env("ALE/Breakout-v5", 1)
    env.reset()
    for _ in range(30):
        env.step(np.array([1]))
    state = env_state(env)()
    before = state["images"].copy()
    state["0.sent"] = state["0.sent"][:-3]
    images = restore_env(env, state)
    assert (images[:, -1] != before[:, -1]).any()
    np.testing.assert_array_equal(images[:, :-1], before[:, :-1])


def test_a_time_limit_ends_what_waits() -> None:
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    with pytest.raises(TimeLimitError), time_limit(0.05):
        time.sleep(5.0)
    assert time.monotonic() - start < 2.0
    assert signal.getsignal(signal.SIGALRM) is before
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_other_threads_have_no_limit() -> None:
    ended: list[bool] = []

    def wait() -> None:
        with time_limit(0.01):
            time.sleep(0.05)
        ended.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert ended == [True]
