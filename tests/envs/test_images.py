"""Image environments other than Atari: formats, seeds, returns, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
from small_runs import register_env
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnv

from envs import AtariVecEnv, ImageFormat, episode_seed, make_vec_env

with warnings.catch_warnings():  # SWIG's types warn, and as an error that ends the process
    warnings.simplefilter("ignore")
    import Box2D  # noqa: F401

TINY = "hubrl/TinyImage-v0"


def first_step(env: VecEnv) -> tuple[np.ndarray, np.ndarray]:
    """The observations of a reset and of a step with sampled actions."""
    env.action_space.seed(0)
    first = env.reset()
    second, *_ = env.step(np.stack([env.action_space.sample() for _ in range(env.num_envs)]))
    env.close()
    return first, second


class TestFormat:
    """Observations are (stack * channels, size, size) uint8, newest image last."""

    @pytest.mark.parametrize("env_id", [TINY, "CarRacing-v3", "MiniGrid-Empty-5x5-v0"])
    def test_default_is_what_atari_gives(self, env_id: str) -> None:
        env = make_vec_env(env_id, 2)
        assert env.observation_space == gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        first, second = first_step(env)
        assert first.shape == second.shape == (2, 4, 84, 84)
        assert first.dtype == np.uint8
        assert not first[:, :-1].any()  # an episode starts with one image after black ones
        assert first[:, -1].any(axis=(1, 2)).all()
        np.testing.assert_array_equal(second[:, -2], first[:, -1])
        assert not second[:, :2].any()

    def test_grey_weights_and_area_resize(self) -> None:
        raw, _ = gym.make("CarRacing-v3").reset(seed=episode_seed(0, 0, 0))
        grey = (raw @ [0.2125, 0.7154, 0.0721]).astype(np.uint8)  # Gymnasium's weights: ITU 709
        expected = cv2.resize(grey, (84, 84), interpolation=cv2.INTER_AREA)
        first, _ = first_step(make_vec_env("CarRacing-v3", 1, seed=0))
        assert np.abs(first[0, -1].astype(int) - expected).max() <= 1  # float rounding

    def test_colour_has_three_channels_for_each_image(self) -> None:
        image = ImageFormat(size=50, grey=False, stack=2)
        env = make_vec_env("MiniGrid-Empty-5x5-v0", 1, image=image)
        assert env.observation_space.shape == (6, 50, 50)
        first, second = first_step(env)
        np.testing.assert_array_equal(second[:, :3], first[:, 3:])
        assert (first[:, 3] != first[:, 5]).any()  # red is not blue

    def test_atari_takes_the_format(self) -> None:
        env = make_vec_env("ALE/Pong-v5", 1, image=ImageFormat(size=64, grey=False, stack=1))
        assert isinstance(env, AtariVecEnv)
        assert env.observation_space.shape == (3, 64, 64)
        env.close()

    def test_grey_images_of_two_shapes(self) -> None:
        for shape in ((40, 40), (40, 40, 1)):
            register("GreyShape-v0", gym.spaces.Box(0, 255, shape, np.uint8))
            assert make_vec_env("GreyShape-v0", 1).observation_space.shape == (4, 84, 84)


class TestAtariMode:
    """What ``training`` means."""

    @pytest.mark.parametrize("training", [True, False])
    def test_life_losses_and_clipping(self, training: bool) -> None:
        env = make_vec_env("ALE/Seaquest-v5", 1, training=training)
        env.reset()
        rng = np.random.default_rng(0)
        lost, rewards = 0, set()
        for _ in range(250):
            _, reward, dones, infos = env.step(rng.integers(18, size=1))
            lost += int(dones[0] and "episode" not in infos[0])
            rewards.add(float(reward[0]))
        assert (lost > 0) == training
        assert rewards == ({0.0, 1.0} if training else {0.0, 20.0})  # a fish earns 20
        env.close()


class TestEpisodes:
    """Seeds, returns, ends."""

    def test_every_episode_has_its_own_seed(self) -> None:
        env = make_vec_env(TINY, 2, seed=7)
        starts = [env.reset()]
        dones = np.zeros(2, dtype=bool)
        while not dones.any():
            observations, _, dones, _ = env.step(np.zeros(2, dtype=int))
        starts.append(observations)
        for episode, observations in enumerate(starts):
            for index in range(2):
                raw, _ = gym.make(TINY).reset(seed=episode_seed(7, index, episode))
                size = (84, 84)
                expected = cv2.resize(raw[..., 0], size, interpolation=cv2.INTER_AREA)
                np.testing.assert_array_equal(observations[index, -1], expected)

    def test_seed_starts_over(self) -> None:
        env = make_vec_env(TINY, 3, seed=7)
        first = env.reset()
        env.reset()
        env.seed(7)
        np.testing.assert_array_equal(env.reset(), first)
        env.seed(8)
        assert (env.reset() != first).any()

    def test_returns_of_ended_episodes(self) -> None:
        env = make_vec_env(TINY, 1)
        env.reset()
        total = 0.0
        for _ in range(8):
            _, rewards, dones, infos = env.step(np.array([1]))
            total += rewards[0]
        assert dones[0]
        assert infos[0]["terminal_observation"].shape == (4, 84, 84)
        assert (infos[0]["episode"]["r"], infos[0]["episode"]["l"]) == (total, 8)
        assert env.env_is_wrapped(Monitor) == [True]

    @pytest.mark.parametrize("env_id", [TINY, "hubrl/TinyImageContinuous-v0"])
    def test_a_cnn_policy_solves_the_tiny_images_in_seconds(self, env_id: str) -> None:
        image = ImageFormat(size=36, stack=1)
        env = make_vec_env(env_id, 4, seed=0, image=image)
        model = PPO("CnnPolicy", env, seed=0, n_steps=32, learning_rate=1e-3, gamma=0.0, n_epochs=4)
        model.learn(768)
        score, _ = evaluate_policy(model, make_vec_env(env_id, 1, seed=1, image=image), 10)
        assert score >= 7.0


def register(env_id: str, space: gym.Space[Any], channels: int = 3) -> None:
    """An environment of the space's samples."""

    class Samples(gym.Env):
        observation_space = space
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
            return self.observation_space.sample(), {}

    register_env(env_id, Samples)


class TestBadInput:
    """Each message names the argument, its value, what is allowed, and the closest id."""

    @pytest.mark.parametrize(
        ("env_id", "closest"),
        [
            ("CarRacing-v9", "CarRacing-v3"),
            ("Breakout-v5", "ALE/Breakout-v5"),
            ("MiniGrid-Empty-5x6-v0", "MiniGrid-Empty-5x5-v0"),
            ("hubrl/TinyImages-v0", "hubrl/TinyImage-v0"),
        ],
    )
    def test_unknown_id(self, env_id: str, closest: str) -> None:
        message = f"env '{env_id}' is not registered in Gymnasium .*closest: .*{closest}"
        with pytest.raises(ValueError, match=message):
            make_vec_env(env_id, 1)

    def test_nothing_is_close(self) -> None:
        with pytest.raises(ValueError, match=r"env '%' is not registered .*e\.g\. ALE/Breakout-v5"):
            make_vec_env("%", 1)

    def test_a_module_without_that_id(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "empty_module.py").write_text("")
        monkeypatch.syspath_prepend(str(tmp_path))
        message = "'empty_module' was imported, but has registered none of this name; "
        with pytest.raises(ValueError, match=message):
            make_vec_env("empty_module:Nope-v0", 1)

    def test_missing_module(self) -> None:
        message = (
            r"needs the module 'no_such\.thing', which Python doesn't find: .*PYTHONPATH=FOLDER"
        )
        with pytest.raises(ValueError, match=message):
            make_vec_env("no_such.thing:Env-v0", 1)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("import no_such", "ModuleNotFoundError: No module named 'no_such'"),
            ("1 +", "SyntaxError: invalid syntax"),
            ("1 / 0", "ZeroDivisionError: division by zero"),
        ],
    )
    def test_a_module_that_cannot_be_imported(
        self, content: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "spoilt_module.py").write_text(content)
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ValueError, match=rf"importing 'spoilt_module' failed \({reason}"):
            make_vec_env("spoilt_module:Env-v0", 1)
        with pytest.raises(
            ValueError, match=r"importing '.x' failed \(TypeError: the 'package' arg"
        ):
            make_vec_env(".x:Env-v0", 1)

    def test_an_environment_that_fails_when_it_is_made(self) -> None:
        def make(size: int, **_: Any) -> gym.Env[Any, Any]:
            raise AssertionError("never called without a size")

        gym.register("NeedsSize-v0", entry_point=make)
        message = r"env 'NeedsSize-v0' can't be made \(TypeError: .*argument: 'size'"
        with pytest.raises(ValueError, match=message):
            make_vec_env("NeedsSize-v0", 1)

    def test_missing_package(self) -> None:
        def make(**_: Any) -> gym.Env[Any, Any]:
            raise gym.error.DependencyNotInstalled("run `pip install gymnasium[box2d]`")

        gym.register("NeedsBox-v0", entry_point=make)
        message = r"env 'NeedsBox-v0' can't be made: .*pip install gymnasium\[box2d\]"
        with pytest.raises(ValueError, match=message):
            make_vec_env("NeedsBox-v0", 1)

    @pytest.mark.parametrize("env_id", ["BreakoutNoFrameskip-v4", "Pong-v4"])
    def test_frame_skip_twice(self, env_id: str) -> None:
        with pytest.raises(ValueError, match=f"env '{env_id}' has its own frame skip.*ALE/Name-v5"):
            make_vec_env(env_id, 1)

    @pytest.mark.parametrize(
        "space",
        [
            gym.spaces.Box(-1, 1, (4,), np.float32),
            gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (40, 40, 3), np.uint8)}),
            gym.spaces.Discrete(5),
            gym.spaces.Box(0, 255, (3, 40, 40), np.uint8),
            gym.spaces.Box(0, 1, (40, 40, 3), np.float32),
            gym.spaces.Box(0, 10, (7, 7, 3), np.uint8),
        ],
    )
    def test_no_image(self, space: gym.Space[Any]) -> None:
        register("NoImage-v0", space)
        with pytest.raises(ValueError, match=r"'NoImage-v0' observes .*only images are allowed"):
            make_vec_env("NoImage-v0", 1)

    @pytest.mark.parametrize("shape", [(40, 40), (40, 40, 1)])
    def test_grey_images_where_colours_are_wanted(self, shape: tuple[int, ...]) -> None:
        image = np.random.default_rng(0).integers(256, size=shape).astype(np.uint8)

        class Grey(gym.Env):
            observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
            action_space = gym.spaces.Discrete(2)

            def reset(self, *, seed: int | None = None, options: dict | None = None) -> Any:
                return image, {}

        register_env("Grey-v0", Grey)
        grey, colour = (
            make_vec_env("Grey-v0", 1, image=ImageFormat(size=36, grey=grey, stack=2)).reset()
            for grey in (True, False)
        )
        assert grey.shape == (1, 2, 36, 36)
        assert len(np.unique(grey[0, 1])) > 100
        np.testing.assert_array_equal(colour, grey.repeat(3, axis=1))

    def test_an_atari_game_may_name_its_module(self) -> None:
        env = make_vec_env("ale_py:ALE/Pong-v5", 1, sticky=0.25)
        assert isinstance(env, AtariVecEnv)
        env.close()

    def test_sticky_is_for_atari(self) -> None:
        with pytest.raises(ValueError, match=r"sticky is 0.25, but CarRacing-v3 is no Atari game"):
            make_vec_env("CarRacing-v3", 1, sticky=0.25)

    def test_numbers(self) -> None:
        with pytest.raises(ValueError, match="n_envs is 0, but at least 1 is needed"):
            make_vec_env(TINY, 0)
        with pytest.raises(ValueError, match="seed is -1, but a seed is 0 or more"):
            make_vec_env(TINY, 1, seed=-1)
        with pytest.raises(ValueError, match="size is 0, but at least 1 is needed"):
            ImageFormat(size=0)
        with pytest.raises(ValueError, match="stack is 0, but at least 1 is needed"):
            ImageFormat(stack=0)


class TestSmallImages:
    """Images that would be blurs of what an encoder was trained on."""

    @pytest.mark.parametrize(("min_size", "fits"), [(1, True), (36, True), (37, False)])
    def test_the_environments_own_size_counts(self, min_size: int, fits: bool) -> None:
        image = ImageFormat(size=84, min_size=min_size)
        if fits:
            make_vec_env(TINY, 1, image=image)
        else:
            message = f"36x36 px, but at least {min_size}x{min_size} px are needed.*render larger"
            with pytest.raises(ValueError, match=message):
                make_vec_env(TINY, 1, image=image)

    def test_minigrid_renders_larger_cells(self) -> None:
        image = ImageFormat(size=84, min_size=42)
        first, _ = first_step(make_vec_env("MiniGrid-Empty-5x5-v0", 1, image=image))
        assert first.shape == (1, 4, 84, 84)
