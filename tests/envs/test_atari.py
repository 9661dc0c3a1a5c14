"""AtariVecEnv against SB3's AtariWrapper pipeline under the same actions, and its own promises."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import pytest
from ale_py import roms
from stable_baselines3 import PPO
from stable_baselines3.common.atari_wrappers import AtariWrapper
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack

from envs import AtariVecEnv, episode_seed
from envs.atari import HISTORY_DEPENDENT, SEED_EVERY, rom_name

# Each game with the largest share of pixels in which grey before the maximum may differ.
GAMES = [
    ("ALE/Breakout-v5", 0.0),
    ("ALE/Pong-v5", 0.002),
    ("ALE/SpaceInvaders-v5", 0.0),
    ("ALE/Seaquest-v5", 0.002),
    ("ALE/Qbert-v5", 0.0002),
    ("ALE/Riverraid-v5", 0.02),
]
GREY_FIRST, GREY_LAST = 0, 1  # the two environments of a comparison: ALE's order and SB3's own
ALL_IDS = sorted(name for name in gym.registry if name.startswith("ALE/") and name.endswith("-v5"))
# Their first action is FIRE, not NOOP: SB3's wrappers refuse them.
NOT_FOR_SB3 = {"ALE/Backgammon-v5", "ALE/VideoCheckers-v5"}


# --- SB3's pipeline, made to start its games as ours do -------------------------------------------


class SameStart(gym.Wrapper):
    """Loads the ROM when ours does, with its seed, and waits as many no-ops (SB3's own needs 1)."""

    def __init__(self, env: gym.Env, index: int, seed_every: int, first_frames: deque[int]) -> None:
        super().__init__(env)
        self.index, self.seed_every, self.first_frames = index, seed_every, first_frames
        self.episode = -1

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        self.episode += 1
        if self.episode % self.seed_every == 0:
            self.unwrapped.ale.setInt("random_seed", episode_seed(0, self.index, self.episode))
            self.unwrapped.load_game()
        observation, info = self.env.reset()
        first_frame = self.first_frames.popleft()
        while info["episode_frame_number"] < first_frame:
            observation, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                observation, info = self.env.reset()
        return observation, info


class GreyFirst(gym.ObservationWrapper):
    """Grey as ALE makes it, before the maximum; cv2 gives back equal channels unchanged."""

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return cv2.cvtColor(self.unwrapped.ale.getScreenGrayscale(), cv2.COLOR_GRAY2RGB)


def sb3_env(env_id: str, first_frames: list[deque[int]], max_frames: int) -> VecFrameStack:
    """One or two environments, GREY_FIRST and GREY_LAST."""
    seed_every = 1 if rom_name(env_id) in HISTORY_DEPENDENT else SEED_EVERY

    def make(index: int) -> gym.Env:
        env = gym.make(
            env_id,
            frameskip=1,
            repeat_action_probability=0.0,
            max_num_frames_per_episode=max_frames,
        )
        env = GreyFirst(env) if index == GREY_FIRST else env
        env = SameStart(Monitor(env), index, seed_every, first_frames[index])
        return AtariWrapper(env, noop_max=0)

    envs = DummyVecEnv([lambda i=i: make(i) for i in range(len(first_frames))])
    return VecFrameStack(envs, 4, channels_order="last")


class Step(NamedTuple):
    """What both sides return for the same action; observations (2, 4, 84, 84)."""

    ours: np.ndarray
    theirs: np.ndarray
    rewards: tuple[np.ndarray, np.ndarray]
    dones: tuple[np.ndarray, np.ndarray]
    infos: tuple[list[dict], list[dict]]


def play_both(
    env_id: str, n_steps: int, max_frames: tuple[int, int] = (108_000, 108_000), n_envs: int = 2
) -> list[Step]:
    """Random play of both; theirs starts a game in the step in which ours does, or fails."""
    ours = AtariVecEnv(env_id, n_envs, seed=0, max_frames=max_frames[0])
    first_frames: list[deque[int]] = [deque() for _ in range(n_envs)]
    theirs = sb3_env(env_id, first_frames, max_frames[1])
    our_first = ours.reset()
    for i in range(n_envs):
        first_frames[i].append(ours.reset_infos[i]["frames"])
    nothing = (np.zeros(n_envs), np.zeros(n_envs))
    steps = [Step(our_first, channels_first(theirs.reset()), nothing, nothing, ([], []))]
    rng = np.random.default_rng(0)
    for _ in range(n_steps):
        actions = rng.integers(ours.action_space.n, size=n_envs)
        starts = list(ours.reset_infos)
        our_obs, *our_rest = ours.step(actions)
        for i in range(n_envs):
            if ours.reset_infos[i] is not starts[i]:
                first_frames[i].append(ours.reset_infos[i]["frames"])
        their_obs, *their_rest = theirs.step(actions)
        assert not any(first_frames), "ours started a game that theirs did not start"
        both = zip(our_rest, their_rest, strict=True)
        steps.append(Step(our_obs, channels_first(their_obs), *both))
    ours.close()
    theirs.close()
    return steps


def channels_first(observation: np.ndarray) -> np.ndarray:
    return np.moveaxis(observation, -1, -3)


def assert_same_but_for_images(step: Step) -> None:
    np.testing.assert_array_equal(*step.rewards)
    np.testing.assert_array_equal(*step.dones)
    for our_info, their_info in zip(*step.infos, strict=True):
        assert our_info["TimeLimit.truncated"] == their_info["TimeLimit.truncated"]
        assert our_info["lives"] == their_info["lives"]
        assert ("terminal_observation" in our_info) == ("terminal_observation" in their_info)
        if "episode" in their_info:
            assert our_info["episode"]["r"] == their_info["episode"]["r"]
            assert our_info["episode"]["l"] == their_info["episode_frame_number"]


def assert_same_images(step: Step, i: int) -> None:
    np.testing.assert_array_equal(step.ours[i], step.theirs[i])
    our_info, their_info = (infos[i] if infos else {} for infos in step.infos)
    if "terminal_observation" in our_info:
        ours = our_info["terminal_observation"]
        theirs = channels_first(their_info["terminal_observation"])
        np.testing.assert_array_equal(ours[:-1], theirs[:-1])
        if "episode" in their_info:  # a game's very last image is ALE's own
            assert (ours[-1] >= ours[-2]).all()
        else:
            np.testing.assert_array_equal(ours[-1], theirs[-1])


class TestAgainstSB3:
    """
    The same actions give the same rewards, dones, lives, truncations and true returns as SB3.

    Images: ALE's grey palette equals cv2's rounding for every NTSC colour, and both sides resize
    with INTER_AREA, so the differences are these, and each test names the one that it bounds:

    - Ours takes the maximum over two frames of grey values (ALE's order), SB3 of each colour
      channel before grey. With ALE's order in SB3's pipeline, all images are equal. As it is,
      ours is never brighter, and few pixels differ: the colours must flicker or move.
    - The last image of a game: ALE leaves out the frame in which it ended, and shows the image
      before once more, brightened by the last full frame if there is one. Nothing learns from it:
      the value of a game that is over is 0.
    - SB3 draws 1 to 30 no-ops, ours 0 to 29, counted among the frames of an episode by both; here
      SB3 is told to wait as long as ours did. SB3 counts them toward truncation too.
    - The length of an episode is ALE's own count of frames. In a few games (Berzerk) it includes
      those in which the game's mode was selected; SB3's Monitor counts from the first no-op.
    """

    @pytest.mark.parametrize(
        ("env_id", "share"),
        [*GAMES[:3], *(pytest.param(*game, marks=pytest.mark.slow) for game in GAMES[3:])],
    )
    def test_same_play(self, env_id: str, share: float) -> None:
        steps = play_both(env_id, 150)
        for step in steps:
            assert_same_but_for_images(step)
            assert_same_images(step, GREY_FIRST)
        ours = np.stack([step.ours[GREY_LAST] for step in steps]).astype(int)
        theirs = np.stack([step.theirs[GREY_LAST] for step in steps]).astype(int)
        assert (ours <= theirs).all()
        assert (ours != theirs).mean() <= share
        assert (theirs - ours).max() <= 32

    def test_a_game_is_truncated_as_in_sb3(self) -> None:
        probe = AtariVecEnv("ALE/SpaceInvaders-v5", 1, seed=0)
        probe.reset()
        noops = probe.reset_infos[0]["frames"]  # they count toward SB3's limit alone
        probe.close()
        steps = play_both("ALE/SpaceInvaders-v5", 98, (400, 400 + noops), n_envs=1)
        for step in steps[:-1]:
            assert not step.dones[0].any()
        assert [dones[0] for dones in steps[-1].dones] == [True, True]  # 98 steps and 2 presses
        ours, theirs = (infos[0] for infos in steps[-1].infos)
        assert ours["TimeLimit.truncated"]
        assert theirs["TimeLimit.truncated"]
        for key in "rl":
            assert ours["episode"][key] == theirs["episode"][key]
        np.testing.assert_array_equal(
            ours["terminal_observation"][:-1],
            channels_first(theirs["terminal_observation"])[:-1],
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("env_id", [i for i in ALL_IDS if i not in NOT_FOR_SB3])
    def test_every_game(self, env_id: str) -> None:
        for step in play_both(env_id, 300):
            assert_same_but_for_images(step)
            assert_same_images(step, GREY_FIRST)


@pytest.fixture
def breakout() -> AtariVecEnv:
    env = AtariVecEnv("ALE/Breakout-v5", 2, seed=0)
    yield env
    env.close()


def play(env: AtariVecEnv, n_steps: int, seed: int = 0) -> list[tuple]:
    rng = np.random.default_rng(seed)
    return [env.step(rng.integers(env.action_space.n, size=env.num_envs)) for _ in range(n_steps)]


class TestEnds:
    """Lost lives, games that are over, truncation, and what the infos say of them."""

    def test_a_lost_life_is_done_and_the_game_goes_on(self, breakout: AtariVecEnv) -> None:
        breakout.reset()
        lives, lost, over = 5, 0, 0
        for _, _, dones, infos in play(breakout, 300):
            if dones[0] and "episode" not in infos[0]:
                lost += 1
                lives -= 1
                assert infos[0]["lives"] == lives
            if "episode" in infos[0]:
                over += 1
                assert dones[0]
                assert infos[0]["lives"] == 0
                lives = 5
        assert lost >= 4 * over > 0

    def test_without_life_losses_only_the_ends_differ(self) -> None:
        with_lives = AtariVecEnv("ALE/Breakout-v5", 2, seed=0)
        without = AtariVecEnv(
            "ALE/Breakout-v5", 2, seed=0, life_loss_ends_episode=False, clip_reward=False
        )
        np.testing.assert_array_equal(with_lives.reset(), without.reset())
        lost = 0
        for ours, theirs in zip(play(with_lives, 250), play(without, 250), strict=True):
            np.testing.assert_array_equal(ours[0], theirs[0])
            np.testing.assert_array_equal(ours[1], np.sign(theirs[1]))
            for i in range(2):
                assert theirs[2][i] == ("episode" in theirs[3][i])
                assert ours[3][i].get("episode") == theirs[3][i].get("episode")
                lost += int(ours[2][i] and not theirs[2][i])
        assert lost > 0

    def test_the_terminal_observation_ends_with_the_newest_frame(self, breakout) -> None:
        before = breakout.reset()
        for observations, _, dones, infos in play(breakout, 100):
            for i in np.flatnonzero(dones):
                terminal = infos[i]["terminal_observation"]
                np.testing.assert_array_equal(terminal[:-1], before[i, 1:])
                assert not observations[i, :-1].any()  # an episode starts with one frame
                assert observations[i, -1].any()
            before = observations

    def test_clipped_rewards_and_true_returns(self) -> None:
        clipped = AtariVecEnv("ALE/SpaceInvaders-v5", 1, seed=0)
        unclipped = AtariVecEnv("ALE/SpaceInvaders-v5", 1, seed=0, clip_reward=False)
        clipped.reset()
        unclipped.reset()
        total = 0.0
        for ours, theirs in zip(play(clipped, 600), play(unclipped, 600), strict=True):
            assert ours[1][0] == np.sign(theirs[1][0])
            total += theirs[1][0]
            if "episode" in ours[3][0]:
                assert ours[3][0]["episode"]["r"] == total
                break
        assert total > 1  # the first game was played to its end

    def test_an_end_while_a_life_starts_is_reported(self, breakout: AtariVecEnv) -> None:
        breakout.reset()
        dones = [step[2][0] for step in play(breakout, 100)]
        steps_of_life = dones.index(True) + 1
        # The NOOP that starts the second life reaches the limit: 2 presses, the steps, the NOOP.
        max_frames = 4 * (2 + steps_of_life + 1)
        cut = AtariVecEnv("ALE/Breakout-v5", 2, seed=0, max_frames=max_frames)
        cut.reset()
        noops = cut.reset_infos[0]["frames"]
        *_, (_, _, dones, infos) = play(cut, steps_of_life)
        assert dones[0]
        assert infos[0]["lives"] == 4
        assert infos[0]["episode"]["l"] == max_frames + noops
        assert not infos[0]["TimeLimit.truncated"]  # the learner's episode ended by the lost life
        cut.close()


class TestSeeds:
    """Episode starts follow from (seed, env index, episode) alone."""

    def test_same_seed_same_run_other_seed_another(self) -> None:
        runs = []
        for seed in (3, 3, 4):
            env = AtariVecEnv("ALE/SpaceInvaders-v5", 2, seed=seed)
            first = env.reset()
            runs.append(np.stack([first, *(step[0] for step in play(env, 60))]))
            env.close()
        np.testing.assert_array_equal(runs[0], runs[1])
        assert (runs[0] != runs[2]).any()
        assert (runs[0][:, 0] != runs[0][:, 1]).any()  # each environment has its own starts

    def test_seed_starts_over(self, breakout: AtariVecEnv) -> None:
        first = [breakout.reset(), *(step[0] for step in play(breakout, 20))]
        assert breakout.seed(0) == [0, 0]
        again = [breakout.reset(), *(step[0] for step in play(breakout, 20))]
        np.testing.assert_array_equal(first, again)

    @pytest.mark.parametrize("game", ["Breakout", "Hangman"])
    def test_an_episode_does_not_depend_on_the_play_before_it(self, game: str) -> None:
        traces = []
        for earlier_steps in (0, 37, 210):
            env = AtariVecEnv(f"ALE/{game}-v5", 1, seed=5, life_loss_ends_episode=False)
            observations = env.reset()
            play(env, earlier_steps, seed=earlier_steps)
            while env.reset_infos[0]["episode"] < 3:
                observations = env.reset()
            assert env.reset_infos[0]["episode"] == 3
            traces.append([observations, *(step[0] for step in play(env, 30, seed=1))])
            env.close()
        np.testing.assert_array_equal(traces[0], traces[1])
        np.testing.assert_array_equal(traces[0], traces[2])

    def test_a_game_after_a_game_over_is_the_one_after_a_reset(self) -> None:
        played = AtariVecEnv("ALE/Breakout-v5", 1, seed=5, life_loss_ends_episode=False)
        skipped = AtariVecEnv("ALE/Breakout-v5", 1, seed=5, life_loss_ends_episode=False)
        played.reset()
        rng = np.random.default_rng(0)
        dones = [False]
        while not dones[0]:
            observation, _, dones, _ = played.step(rng.integers(4, size=1))
        skipped.reset()
        np.testing.assert_array_equal(observation, skipped.reset())

    def test_sticky_actions_follow_the_seed_and_change_play(self) -> None:
        runs = []
        for sticky in (0.0, 0.25, 0.25):
            env = AtariVecEnv("ALE/Breakout-v5", 1, seed=0, sticky=sticky)
            env.reset()
            runs.append(np.stack([step[0] for step in play(env, 60)]))
            env.close()
        np.testing.assert_array_equal(runs[1], runs[2])
        assert (runs[0] != runs[1]).any()

    @pytest.mark.slow
    @pytest.mark.parametrize("env_id", ALL_IDS)
    def test_history_dependent_games_are_known(self, env_id: str) -> None:
        rom = rom_name(env_id)
        if rom in HISTORY_DEPENDENT:
            pytest.skip("seeded at every episode")
        starts = [_second_start(rom, history) for history in range(5)]
        assert starts[1:] == starts[:1] * 4


def _second_start(rom: str, history: int) -> list[tuple[bytes, bytes]]:
    """RAM and screens of a game's first frames after a game of other play, by one ROM load."""
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.setInt("random_seed", 1)
    ale.loadROM(roms.get_rom_path(rom))
    ale.reset_game()
    actions = ale.getMinimalActionSet()
    rng = np.random.default_rng(history)
    for _ in range((0, 13, 257, 1003, 3000)[history]):
        if not ale.game_over():
            ale.act(actions[rng.integers(len(actions))])
    ale.reset_game()
    frames = []
    for k in range(120):
        frames.append((ale.getRAM().tobytes(), ale.getScreen().tobytes()))
        ale.act(actions[k // 4 % len(actions)])
    return frames


class TestAsVecEnv:
    """What SB3 asks of a VecEnv."""

    def test_observations_are_never_changed_afterwards(self, breakout: AtariVecEnv) -> None:
        kept = [breakout.reset(), *(step[0] for step in play(breakout, 5))]
        copies = [observations.copy() for observations in kept]
        play(breakout, 120)  # with lost lives
        breakout.reset()
        np.testing.assert_array_equal(kept, copies)

    def test_colour(self) -> None:
        env = AtariVecEnv("ALE/Breakout-v5", 1, grey=False, frame_stack=2, screen_size=60)
        assert env.observation_space.shape == (6, 60, 60)
        first = env.reset()
        (second, *_), *_ = play(env, 1)
        assert first.shape == (1, 6, 60, 60)
        np.testing.assert_array_equal(second[0, :3], first[0, 3:])
        assert (second[0, 3] != second[0, 5]).any()  # red is not blue
        env.close()

    def test_evaluate_policy_uses_true_returns(self) -> None:
        env = AtariVecEnv("ALE/SpaceInvaders-v5", 2, max_frames=600, screen_size=36)
        model = PPO("CnnPolicy", env, n_steps=4, batch_size=4)
        returns, lengths = evaluate_policy(
            model, env, n_eval_episodes=2, return_episode_rewards=True, deterministic=False
        )
        assert len(returns) == 2
        assert all(score % 5 == 0 for score in returns)  # invaders earn 5 to 30, not 1
        assert max(returns) >= 5
        assert all(length <= 600 + 29 for length in lengths)
        env.close()

    def test_attributes(self, breakout: AtariVecEnv) -> None:
        assert breakout.get_attr("env_id") == ["ALE/Breakout-v5"] * 2
        assert breakout.get_attr("render_mode", indices=0) == [None]
        assert not breakout.has_attr("action_masks")
        assert breakout.env_is_wrapped(Monitor) == [True, True]
        assert breakout.env_is_wrapped(AtariWrapper, indices=[1]) == [False]
        with pytest.raises(NotImplementedError, match="set when it is made"):
            breakout.set_attr("env_id", "ALE/Pong-v5")
        with pytest.raises(NotImplementedError, match="no environment method 'render'"):
            breakout.env_method("render")

    def test_close_twice(self) -> None:
        env = AtariVecEnv("ALE/Pong-v5", 1)
        env.close()
        env.close()


class TestBadInput:
    """Each message names the argument, its value and what is allowed."""

    @pytest.mark.parametrize("env_id", ["ALE/Brekout-v5", "ALE/Breakout-v4", "ALE/Breakout"])
    def test_unknown_game(self, env_id: str) -> None:
        with pytest.raises(ValueError, match=rf"env '{env_id}' is not .*closest: ALE/Breakout-v5"):
            AtariVecEnv(env_id)

    def test_combat_would_end_the_process_and_is_not_offered(self) -> None:
        with pytest.raises(ValueError, match="env 'ALE/Combat-v5' is not an Atari game"):
            AtariVecEnv("ALE/Combat-v5")

    @pytest.mark.parametrize(
        "name", ["n_envs", "frame_stack", "screen_size", "noop_max", "max_frames"]
    )
    def test_numbers_below_1(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} is 0, but at least 1 is needed"):
            AtariVecEnv("ALE/Breakout-v5", **{name: 0})

    def test_sticky_is_a_probability(self) -> None:
        with pytest.raises(ValueError, match=r"sticky is 1.5, but a probability lies in 0..1"):
            AtariVecEnv("ALE/Breakout-v5", sticky=1.5)

    def test_negative_seed(self) -> None:
        with pytest.raises(ValueError, match="seed is -1, but a seed is 0 or more"):
            AtariVecEnv("ALE/Breakout-v5", 1, seed=-1)

    def test_action_out_of_range(self, breakout: AtariVecEnv) -> None:
        breakout.reset()
        with pytest.raises(ValueError, match=r"actions are \[0, 4\], but .* takes 0..3"):
            breakout.step(np.array([0, 4]))


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ALL_IDS)
def test_every_rom_resets_and_steps(env_id: str) -> None:
    env = AtariVecEnv(env_id, 2, seed=0)
    observation = env.reset()
    for observation, rewards, dones, _ in play(env, 100):
        assert observation.shape == (2, 4, 84, 84)
        assert rewards.shape == dones.shape == (2,)
    assert observation.any()
    env.close()
