"""The look before training: returns, the held-out fit, and encoders that see more or less."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_hubs import nature_spec, write_hub
from stable_baselines3.common.vec_env import DummyVecEnv

from hubrl import cli, hubs, ranking
from hubrl.files import file_sha256
from hubrl.ranking import Play, Rank, advice, discounted, explained, held_out, play, rank
from hubrl.specs import load_hub, save_hub


class Bars(gym.Env[np.ndarray, int]):
    """The height of a bright bar is the next reward; episodes of 10 steps."""

    observation_space = gym.spaces.Box(0, 255, (4, 36, 36), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.n_steps = 0
        return self.draw(), {}

    def step(self, action: int) -> Any:
        reward = self.height / 36.0
        self.n_steps += 1
        return self.draw(), reward, self.n_steps == 10, False, {}

    def draw(self) -> np.ndarray:
        self.height = int(self.np_random.integers(1, 37))
        image = np.zeros((4, 36, 36), dtype=np.uint8)
        image[:, : self.height] = 255
        return image


def test_discounted_returns_by_hand() -> None:
    rewards = np.array([[1.0, 0.0], [2.0, 0.0], [4.0, 5.0]])
    dones = np.array([[False, False], [True, False], [False, False]])
    # 1 + 0.99 * 2; 2, the end of an episode; 4. And 0.99^2 * 5; 0.99 * 5; 5.
    expected = [[2.98, 4.9005], [2.0, 4.95], [4.0, 5.0]]
    np.testing.assert_allclose(discounted(rewards, dones), expected)


def test_play_keeps_every_fourth_observation() -> None:
    env = DummyVecEnv([Bars] * 3)
    env.seed(0)
    played = play(env, 14, seed=0)
    assert played.images_NCHW.shape == (15, 4, 36, 36)
    assert played.envs_N.tolist() == [0, 1, 2] * 5
    assert played.returns_N.shape == (15,)
    # Steps 0, 4, 8 of episodes of 10: so many rewards are left, of at most 1 each.
    height = (played.images_NCHW[:, 0, :, 0] > 0).sum(dim=1) / 36.0
    n_left = torch.tensor([10, 6, 2, 8, 4]).repeat_interleave(3)
    assert (played.returns_N >= height - 1e-9).all()
    assert (played.returns_N <= height + n_left - 1).all()
    assert played.n_episodes == 3 * ((5 * 4 + 230) // 10)


def test_held_out_predictions_are_those_of_a_fit_without_the_group() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(24, 5, generator=generator).double()
    targets = torch.randn(24, generator=generator).double() + 3
    groups, penalty = torch.arange(24) % 4, 0.05
    found = held_out(features, targets, groups, penalty)
    spread = features.var(dim=0, correction=0)
    scaled = (features - features.mean(dim=0)) / (spread.sqrt() + 0.01 * spread.mean().sqrt())
    scaled = scaled / 5**0.5
    scaled = torch.cat([scaled, torch.full((24, 1), ranking.INTERCEPT)], dim=1)
    for group in range(4):
        rest, rows = groups != group, groups == group
        # Ridge regression as least squares with extra rows: sqrt(penalty * n) * weights = 0.
        extra = (penalty * 24) ** 0.5 * torch.eye(6, dtype=torch.float64)
        left = torch.cat([scaled[rest], extra])
        right = torch.cat([targets[rest], torch.zeros(6, dtype=torch.float64)])
        weights = torch.linalg.lstsq(left, right[:, None]).solution
        torch.testing.assert_close(found[rows], (scaled[rows] @ weights)[:, 0], atol=1e-8, rtol=0)


def test_explained_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 20, generator=generator)
    signal = features[:, 0].double()
    noise = torch.randn(400, generator=generator).double()
    envs = torch.arange(400) % 8
    images = torch.zeros(400, 1, 1, 1, dtype=torch.uint8)
    r2, low, high = explained(features, Play(images, signal, envs, 1))
    assert r2 > 0.99
    r2, low, high = explained(features, Play(images, signal + noise, envs, 1))
    assert low < r2 < high
    assert r2 == pytest.approx(0.5, abs=0.1)  # half of the variance is noise
    r2, low, high = explained(features, Play(images, noise, envs, 1))
    assert r2 < 0.02


def test_an_encoder_that_sees_ranks_above_one_that_hardly_does(tmp_path: Path) -> None:
    folder = write_hub(tmp_path / "hub", [nature_spec("dim"), nature_spec("sees")])
    dim = folder / "dim.safetensors"
    tensors = load_file(dim)
    tensors["cnn.4.weight"][1:] = 0  # all features but one are constant
    save_file(tensors, dim)
    hub = load_hub(folder)
    cards = [dataclasses.replace(hub.encoders[0], sha256=file_sha256(dim)), hub.encoders[1]]
    save_hub(dataclasses.replace(hub, encoders=tuple(cards)), folder)
    env = DummyVecEnv([Bars] * 8)
    env.seed(0)
    ranks = rank(load_hub(folder), play(env, 400, seed=0))
    by_name = {found.encoder: found for found in ranks}
    assert set(by_name) == {"dim", "sees", "random nature_conv"}
    assert [found.r2 for found in ranks] == sorted((found.r2 for found in ranks), reverse=True)
    assert by_name["sees"].r2 > by_name["dim"].r2 + 0.01


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as exit:
        cli.run(hubs.command, "hubrl hubs", [str(arg) for arg in args])
    assert isinstance(exit.value.code, int)
    return exit.value.code


def test_features_that_are_no_numbers(
    hub5: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = torch.full((128, 4), torch.nan)
    monkeypatch.setattr(ranking, "features_of", lambda *_: bad)
    assert run("rank", hub5, "--env", "hubrl/TinyImage-v0", "-n", 128) == 2
    message = (
        "features of encoder 'a' are NaN or infinite: rank without it, and see what `hubrl hubs"
    )
    assert message in capsys.readouterr().err


def test_the_command(hub5: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rank", hub5, "--env", "hubrl/TinyImage-v0", "-n", 128) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("hubrl/TinyImage-v0: 128 observations of random play, ")
    assert lines[1] == "encoder             R2 of returns (95 % interval)"
    assert {line[:18].strip() for line in lines[2:-1]} == {*"abcde", "random nature_conv"}
    best = next(line[0] for line in lines[2:] if not line.startswith("random"))
    assert lines[-1].startswith(f"first compare --hub {hub5}:{best} with --hub none: its features ")
    assert run("rank", f"{hub5}:c", "--env", "hubrl/TinyImage-v0", "-n", 128) == 0
    assert f"\nfirst compare --hub {hub5}:c with --hub none: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("low", "words"),
    [(0.41, "its features explain more of"), (0.39, "its features explain no more of")],
)
def test_advice_follows_from_random_weights_of_the_same_architecture(
    low: float, words: str, hub5: Path
) -> None:
    ranks = [
        Rank("random other", 0.9, 0.8, 1.0),
        Rank("b", 0.5, low, 0.6),
        Rank("random nature_conv", 0.25, 0.1, 0.4),
        Rank("a", 0.1, 0.0, 0.2),
    ]
    encoder, how_sure = advice(ranks, load_hub(hub5))
    assert encoder == "b"
    assert how_sure.startswith(words)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["HUB", "--env", "ALE/Breakot-v5"], "(closest: ALE/Breakout-v5"),
        (["nowhere", "--env", "ALE/Pong-v5"], "hub 'nowhere' is unknown"),
        (["HUB", "--env", "hubrl/TinyImage-v0", "-n", "3"], "3 is not in the range 64<=x<=10000"),
        (["HUB", "--env", "ALE/MontezumaRevenge-v5", "-n", "64"], "all returns are 0 in 64 obs"),
    ],
)
def test_wrong_input(
    args: list[str], message: str, hub5: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("rank", *[arg.replace("HUB", str(hub5)) for arg in args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
