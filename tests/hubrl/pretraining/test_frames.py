"""The store of frames: stacks across episode ends, pairs within episodes, what is overwritten."""

import numpy as np
import pytest

from envs import AtariVecEnv
from hubrl.pretraining.frames import FrameStore, Places, Player


def numbered(n_kept: int, n_steps: int, episode: int, n_envs: int = 2) -> FrameStore:
    """Frame t of env e is all t * 10 + e + 1; episodes of the same length in all environments."""
    store = FrameStore(n_kept, n_envs, (2, 2))
    for t in range(n_steps):
        images = np.empty((n_envs, 2, 2), dtype=np.uint8)
        images[:] = (t * 10 + np.arange(n_envs) + 1)[:, None, None]
        ages = np.full(n_envs, t % episode)
        store.add(images, ages, np.full(n_envs, t), np.full(n_envs, float(t)))
    return store


def place(step: int, env: int) -> Places:
    return Places(np.array([step]), np.array([env]))


def test_a_stack_is_zero_before_its_episode_begins():
    store = numbered(20, 12, episode=5)
    assert store.observations(place(4, 0))[0, :, 0, 0].tolist() == [11, 21, 31, 41]
    assert store.observations(place(5, 0))[0, :, 0, 0].tolist() == [0, 0, 0, 51]
    assert store.observations(place(6, 1))[0, :, 0, 0].tolist() == [0, 0, 52, 62]


def test_an_action_is_that_of_its_frame():
    store = numbered(20, 12, episode=5)
    assert store.actions(Places(np.array([3, 7, 11]), np.array([0, 1, 0]))).tolist() == [3, 7, 11]


def test_pairs_lie_in_one_episode_and_what_is_overwritten_is_never_read():
    store = numbered(8, 20, episode=4)  # steps 12 to 19 are kept
    offsets = np.resize([1, 2], 500)
    places = store.sample_pairs(np.random.default_rng(0), offsets)
    assert (places.steps % 4 + offsets <= 3).all()
    assert places.steps.min() - 3 >= 12
    assert (places.steps + offsets).max() < 20
    now, later = store.observations(places), store.observations(places.later(offsets))
    assert ((later[:, -1] - now[:, -1])[:, 0, 0] == 10 * offsets).all()


def test_sampling_reaches_every_place_that_is_allowed():
    store = numbered(8, 20, episode=100)
    places = store.sample(np.random.default_rng(0), 1000, ahead=2)
    assert set(places.steps.tolist()) == {15, 16, 17}
    assert set(places.envs.tolist()) == {0, 1}


def test_next_rewards_say_where_the_episode_ends():
    store = numbered(20, 12, episode=5)
    rewards, alive = store.next_rewards(place(3, 0), 4)
    assert rewards.tolist() == [[3.0, 4.0, 5.0, 6.0]]
    assert alive.tolist() == [[True, True, False, False]]


def make_player(n_kept: int = 50, seed: int = 0) -> Player:
    env = AtariVecEnv("ALE/Qbert-v5", 2, sticky=0.25)
    return Player(env, (seed,), n_kept)


def all_observations(player: Player, first: int, last: int) -> np.ndarray:
    steps, envs = np.meshgrid(np.arange(first, last), np.arange(2), indexing="ij")
    return player.frames.observations(Places(steps.ravel(), envs.ravel()))


def test_the_stored_observations_are_those_of_the_environment(monkeypatch):
    player, seen = make_player(400), []
    step = player._env.step
    monkeypatch.setattr(player._env, "step", lambda actions: keep(seen, player) or step(actions))
    player.play_until(300)
    assert np.concatenate(seen).tobytes() == b"".join(
        player.frames.observations(Places(np.full(2, t), np.arange(2))).tobytes()
        for t in range(300)
    )
    assert (player.frames._ages[1:300] == 0).any(), "no episode ended"


def keep(seen: list[np.ndarray], player: Player) -> None:
    seen.append(player._observations.copy())


def test_play_is_the_same_after_a_resume_though_old_chapters_are_skipped(monkeypatch):
    monkeypatch.setattr("hubrl.pretraining.frames.CHAPTER", 40)
    straight, resumed = make_player(), make_player()
    for n_steps in (30, 77, 130):
        straight.play_until(n_steps)
    resumed.play_until(130)
    assert resumed.frames.n_steps == straight.frames.n_steps == 130
    np.testing.assert_array_equal(
        all_observations(resumed, 83, 130), all_observations(straight, 83, 130)
    )
    same = [p.frames.sample(np.random.default_rng(0), 9, 1) for p in (straight, resumed)]
    np.testing.assert_array_equal(same[0], same[1])


def test_another_seed_plays_otherwise():
    one, other = make_player(seed=0), make_player(seed=1)
    one.play_until(30)
    other.play_until(30)
    assert not np.array_equal(all_observations(one, 3, 30), all_observations(other, 3, 30))


def test_an_agent_can_play():
    env = AtariVecEnv("ALE/Qbert-v5", 4)
    player = Player(env, (0,), 50, policy=lambda observations: np.full(len(observations), 3))
    player.play_until(50)
    actions = player.frames.actions(Places(np.repeat(np.arange(50), 4), np.tile(np.arange(4), 50)))
    share = (actions.reshape(50, 4) == 3).mean(axis=0)
    assert share[0] == 1.0
    assert share[1:].mean() == pytest.approx(1 - 0.5 * np.mean([0.5, 0.75, 0.9]) * 5 / 6, abs=0.15)
