"""A run that was stopped and resumed ends with the bytes of one that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from killing import last_hashes, survive
from small_runs import SMALL_OF, register_env, write_small_config

import agents.callbacks
from agents.config import built_in_config, dump_config, load_config
from envs.tiny import TinyImage
from hubrl import train
from hubrl.files import read_json

SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"train.n_timesteps": 20 * 1024, "train.save_freq": 1024, "algorithm.n_epochs": 1},
    # With its buffer of 100,000.
    "qrdqn": {
        "train.n_timesteps": 12_000,
        "train.save_freq": 500,
        "algorithm.learning_starts": 2_000,
        "algorithm.train_freq": 16,
    },
}


def finals(folder: Path) -> dict[str, str]:
    """Hashes of what a run ended with."""
    hashes = last_hashes(folder)
    assert {"policy.safetensors", "run.safetensors"} <= set(hashes)
    return hashes


def run(*args: object) -> int:
    """The command's exit code."""
    result = CliRunner().invoke(train.command, list(map(str, args)), standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.return_value


def stop_at(timesteps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopper(train.ProgressCallback):
        def _on_step(self) -> bool:
            if timesteps and self.num_timesteps >= timesteps[0]:
                timesteps.pop(0)
                os.kill(os.getpid(), signal.SIGTERM)
            return True

    monkeypatch.setattr(train, "ProgressCallback", Stopper)


QUICK = [("ppo", "hub5")]
REST = [(algorithm, hub) for algorithm in SMALL_OF for hub in ("none", "hub5")]


@pytest.mark.parametrize(
    ("algorithm", "hub"),
    [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in REST if each not in QUICK)],
)
def test_every_algorithm(
    algorithm: str, hub: str, hub5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = str(hub5) if hub == "hub5" else hub
    epochs = {"algorithm__n_epochs": 4} if "ppo" in algorithm else {}
    config = write_small_config(
        tmp_path / "c.yaml", algorithm, hub__name=name, train__n_timesteps=200, **epochs
    )
    assert run("--config", config, "--run-dir", "whole") == 0
    stop_at([50, 100, 171], monkeypatch)
    assert run("--config", config, "--run-dir", "cut") == 143
    assert [run("--resume", "cut") for _ in range(3)] == [143, 143, 0]
    assert finals(Path("cut")) == finals(Path("whole"))


@pytest.mark.parametrize("algorithm", ["a2c", "sac"])
def test_a_run_that_was_made_longer(
    algorithm: str, hub5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without schedules it is the longer run, though an evaluation lay between."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "c.yaml"
    constant = {"algorithm__learning_rate": 1e-3, "train__eval_freq": 64}
    for n_timesteps, folder in ((128, "short"), (256, "whole")):
        write_small_config(
            file, algorithm, hub__name=str(hub5), train__n_timesteps=n_timesteps, **constant
        )
        assert run("--config", file, "--run-dir", folder) == 0
    assert finals(Path("short")) != finals(Path("whole"))
    assert run("--resume", "short", "-n", 256) == 0
    assert finals(Path("short")) == finals(Path("whole"))


@pytest.mark.parametrize("algorithm", ["qrdqn", pytest.param("dqn", marks=pytest.mark.slow)])
def test_a_target_network_that_moves_within_a_rollout(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = {"algorithm__tau": 0.1, "algorithm__target_update_interval": 1, "env__n_envs": 1}
    config = write_small_config(tmp_path / "c.yaml", algorithm, hub__name="none", **target)
    assert run("--config", config, "--run-dir", "whole") == 0
    stop_at([50], monkeypatch)
    assert run("--config", config, "--run-dir", "cut") == 143
    assert run("--resume", "cut") == 0
    assert finals(Path("cut")) == finals(Path("whole"))


class Breaking(TinyImage):
    """Fails in the third step of a rollout of four, until it is mended."""

    is_mended, n_steps = False, 0

    def step(self, action: Any) -> Any:
        Breaking.n_steps += 1
        if Breaking.n_steps == 51 and not self.is_mended:
            raise ZeroDivisionError
        return super().step(action)


def test_an_environment_that_fails_after_the_target_network_has_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    register_env("Breaking-v0", Breaking)
    monkeypatch.setattr(Breaking, "n_steps", 0)
    target = {"algorithm__tau": 0.1, "algorithm__target_update_interval": 1, "env__n_envs": 1}
    target |= {"train__save_freq": 20, "env__id": "Breaking-v0"}
    config = write_small_config(tmp_path / "c.yaml", "dqn", hub__name="none", **target)
    with pytest.raises(click.ClickException, match="environment 0 raised ZeroDivisionError"):
        run("--config", config, "--run-dir", "cut")
    assert read_json(Path("cut/checkpoints/last/state.json"))["num_timesteps"] == 40
    monkeypatch.setattr(Breaking, "is_mended", True)
    assert run("--resume", "cut") == 0
    assert run("--config", config, "--run-dir", "whole") == 0
    assert finals(Path("cut")) == finals(Path("whole"))


class Forgetful(TinyImage):
    """Each that is made has a background of its own, whatever its seeds."""

    n_made = 0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        Forgetful.n_made += 1
        self._shade = Forgetful.n_made

    def render(self) -> np.ndarray:
        return np.maximum(super().render(), self._shade).astype(np.uint8)


def test_an_environment_that_does_not_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    register_env("Forgetful-v0", Forgetful)
    config = write_small_config(tmp_path / "c.yaml", env__id="Forgetful-v0")
    stop_at([50], monkeypatch)
    assert run("--config", config, "--run-dir", "cut") == 143
    result = CliRunner().invoke(train.command, ["--resume", "cut"], standalone_mode=False)
    assert result.return_value == 0
    assert "environments 0, 1 do not come back to where they were" in result.output
    assert read_json(Path("cut/checkpoints/last/state.json"))["num_timesteps"] >= 100


@pytest.mark.parametrize("moment", ["update", "evaluation"])
def test_a_signal_at_the_very_end(
    moment: str, hub5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last update, or in the evaluation after it: all rollouts are done."""
    monkeypatch.chdir(tmp_path)
    config = write_small_config(
        tmp_path / "c.yaml", hub__name=str(hub5), train__n_timesteps=64, train__eval_freq=64
    )
    assert run("--config", config, "--run-dir", "whole") == 0

    class Stopper(train.ProgressCallback):
        def _on_rollout_end(self) -> None:
            if moment == "update" and self.num_timesteps >= 64:
                os.kill(os.getpid(), signal.SIGTERM)

    def evaluate_and_stop(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        evaluate = agents.callbacks.evaluate
        patch.setattr(train, "ProgressCallback", Stopper)
        if moment == "evaluation":
            patch.setattr("agents.callbacks.evaluate", evaluate_and_stop)
        assert run("--config", config, "--run-dir", "cut") == 143
    assert read_json(Path("cut/checkpoints/last/state.json"))["num_timesteps"] == 64
    assert run("--resume", "cut") == 0
    assert finals(Path("cut")) == finals(Path("whole"))
    assert len(Path("cut/evaluations.csv").read_text().splitlines()) == 1 + 2


def test_games_of_atari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_small_config(tmp_path / "c.yaml", env__id="ALE/Breakout-v5")
    assert run("--config", config, "--run-dir", "whole") == 0
    stop_at([50], monkeypatch)
    assert run("--config", config, "--run-dir", "cut") == 143
    assert run("--resume", "cut") == 0
    assert finals(Path("cut")) == finals(Path("whole"))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", SETTINGS)
def test_killed_at_random_moments(algorithm: str, tmp_path: Path) -> None:
    overrides = {"train.eval_freq": 0, "hub.precision": "float32", "train.device": "cpu"}
    config = load_config(built_in_config(algorithm), overrides | SETTINGS[algorithm])
    (tmp_path / "c.yaml").write_text(dump_config(config))
    survive(tmp_path, "hubrl.train", "--config", "c.yaml")
    assert finals(tmp_path / "cut") == finals(tmp_path / "whole")
