"""``hubrl evaluate`` on the folder of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_hubs import nature_spec, write_hub
from small_runs import small_config, write_small_config

from agents.runs import derive_seed
from hubrl import cli, evaluate, train
from hubrl.games import make_env


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with both checkpoints."""
    root = tmp_path_factory.mktemp("finished")
    hub = write_hub(root / "hub5", [nature_spec(name) for name in "abcde"])
    folder, config = root / "run", write_small_config(root / "c.yaml")
    args = ["--config", config, "--hub", hub, "--run-dir", folder, "--eval-freq", 64]
    train.command.main([str(arg) for arg in args], standalone_mode=False)
    return folder


@pytest.fixture
def finished_run(trained_once: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(trained_once, tmp_path / "run")


def run(*args: object) -> object:
    with pytest.raises(SystemExit) as exit:
        cli.run(evaluate.command, "hubrl evaluate", [str(arg) for arg in args])
    return exit.value.code


def test_evaluation_of_a_run(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(finished_run) == 0
    output = capsys.readouterr().out
    result = json.loads((finished_run / "evaluation.json").read_text())
    assert len(result["returns"]) == len(result["lengths"]) == 20
    mean = sum(result["returns"]) / 20
    assert result["mean_return"] == pytest.approx(mean)
    low, high = result["interval_95"]
    assert low < mean < high
    assert f"20 games: mean return {mean:.2f} (95% interval {low:.2f} to {high:.2f})" in output
    assert result["checkpoint"] == "best"
    assert result["timesteps"] in (64, 128)
    # Other games than those by which training chose the best checkpoint.
    assert result["seed"] == derive_seed(0, "evaluate") != derive_seed(0, "evaluation")


def test_options(finished_run: Path, tmp_path: Path) -> None:
    def returns(*args: object) -> list[float]:
        file = tmp_path / "e.json"
        assert run(finished_run, "--episodes", 6, "--json", file, *args) == 0
        result = json.loads(file.read_text())
        assert len(result["returns"]) == 6
        values: list[float] = result["returns"]
        return values

    assert returns("--seed", 1) == returns("--seed", 1)
    assert returns("--seed", 1) != returns("--seed", 2)
    returns("--checkpoint", "last")
    assert json.loads((tmp_path / "e.json").read_text())["timesteps"] == 128
    assert not (finished_run / "evaluation.json").exists()


@pytest.mark.parametrize("algorithm", ["recurrent_ppo", "ppo"])
def test_an_lstm_begins_anew_where_a_life_is_lost(algorithm: str) -> None:
    """As while it learned; games are whole nevertheless, and rewards not clipped."""
    config = small_config(algorithm, {"env.id": "ALE/SpaceInvaders-v5"})
    env = make_env(config, 1)
    env.reset()
    n_ends, rewards, game = 0, [], None
    while game is None:
        _, reward, done, info = env.step(np.array([1]))  # FIRE, and be hit
        n_ends, game = n_ends + done[0], info[0].get("episode")
        rewards.append(reward[0])
    env.close()
    assert game["r"] == sum(rewards)
    assert max(rewards) > 1
    assert n_ends == (3 if algorithm == "recurrent_ppo" else 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "nowhere is not the folder of a run: it has no config.yaml"),
        (
            ["RUN", "--episodes", "0"],
            "for '-n' / '--episodes': 0 is not in the range",
        ),
        (["RUN", "--checkpoint", "first"], "'first' is not one of 'best', 'last'"),
        (["RUN", "--json", "no/e.json"], "--json no/e.json: there is no folder no"),
        (["RUN", "--json", "."], "--json . is a folder: give a file"),
        ([], "Missing argument 'RUN'"),
    ],
)
def test_wrong_input(
    finished_run: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(*[arg.replace("RUN", str(finished_run)) if arg == "RUN" else arg for arg in args]) == 2
    )
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (finished_run / "evaluation.json").exists()


def test_one_game_has_no_interval(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run(finished_run, "--episodes", 1) == 0
    result = json.loads((finished_run / "evaluation.json").read_text())
    assert result["interval_95"] is None
    text = f"1 game: return {result['mean_return']:.2f} (give more --episodes for an interval)"
    assert text in capsys.readouterr().out


def test_a_full_disk_costs_the_file_alone(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(finished_run, "--episodes", 2, "--json", "/dev/full") == 1
    output = capsys.readouterr()
    assert "2 games: mean return" in output.out
    assert "No space left" in output.err
    assert output.err.count("\n") == 1
    (finished_run / "evaluation.json").mkdir()
    assert run(finished_run) == 2
    assert "evaluation.json is a folder: give a file" in capsys.readouterr().err


def test_a_damaged_checkpoint(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = finished_run / "checkpoints" / "best" / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert run(finished_run) == 2
    assert "is damaged (policy.safetensors has another sha256)" in capsys.readouterr().err
