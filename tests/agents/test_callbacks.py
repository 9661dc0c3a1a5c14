"""Callbacks of a run: when they act, what they write, and how a signal stops them."""

from __future__ import annotations

import csv
import itertools
import os
import signal
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_config, small_env
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from agents import callbacks
from agents.algorithms import build_model
from agents.callbacks import (
    CheckpointCallback,
    EncodersCallback,
    EpisodesCallback,
    EvaluationCallback,
    EveryN,
    ProgressCallback,
)
from agents.checkpoints import load_checkpoint
from agents.runs import make_logger
from envs import env_state
from hubrl.files import read_json
from hubrl.signals import StopSignal


class SignalAt(BaseCallback):
    """Sends SIGTERM to this process after so many steps."""

    def __init__(self, timesteps: int) -> None:
        super().__init__()
        self._timesteps = timesteps

    def _on_step(self) -> bool:
        if self.num_timesteps == self._timesteps:
            os.kill(os.getpid(), signal.SIGTERM)
        return True


def learn(folder: Path, more: list[BaseCallback] | None = None, **overrides: Any) -> BaseAlgorithm:
    """On-policy: 32 steps are a rollout."""
    values = {key.replace("__", "."): value for key, value in overrides.items()}
    config = small_config(overrides=values)
    model, stop = build_model(config, small_env()), StopSignal()
    if (folder / "checkpoints" / "last").exists():
        load_checkpoint(model, folder / "checkpoints" / "last")
    folder.mkdir(exist_ok=True)
    model.set_logger(make_logger(folder, model.num_timesteps))
    own = [
        CheckpointCallback(folder, config.train, stop, env_state),
        EvaluationCallback(folder, partial(small_env, training=False), config.train, stop),
        ProgressCallback(),
    ]
    with stop.caught():
        n_left = config.train.n_timesteps - model.num_timesteps
        every = [*(more or []), *own]
        model.learn(n_left, callback=every, reset_num_timesteps=False, log_interval=None)
    model.logger.close()
    return model


def evaluated(folder: Path) -> list[int]:
    with (folder / "evaluations.csv").open() as file:
        return [int(row["timesteps"]) for row in csv.DictReader(file) if row["episode"] == "0"]


def test_every_n() -> None:
    due = EveryN(100, 0)
    assert [n for n in range(0, 500, 32) if due.is_due(n)] == [128, 224, 320, 416]
    due = EveryN(100, 150)
    assert [n for n in range(160, 350, 32) if due.is_due(n)] == [224, 320]
    assert not any(EveryN(0, 0).is_due(n) for n in range(100))


def test_evaluations_and_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[tuple[str, int]] = []
    save = callbacks.save_checkpoint

    def remember(model: BaseAlgorithm, folder: Path, *args: Any, **kwargs: Any) -> None:
        saved.append((folder.name, model.num_timesteps))
        save(model, folder, *args, **kwargs)

    monkeypatch.setattr(callbacks, "save_checkpoint", remember)
    learn(tmp_path, train__eval_freq=60, train__save_freq=40, train__n_timesteps=160)
    assert evaluated(tmp_path) == [64, 128, 160]
    assert [n for name, n in saved if name == "last"] == [64, 96, 128, 160]
    best = read_json(tmp_path / "checkpoints" / "best" / "state.json")
    with (tmp_path / "evaluations.csv").open() as file:
        rows = list(csv.DictReader(file))
    means = {
        n: sum(float(row["return"]) for row in rows if int(row["timesteps"]) == n) / 2
        for n in (64, 128, 160)
    }
    assert best["mean_return"] == max(means.values())
    assert means[best["num_timesteps"]] == best["mean_return"]


def test_a_kill_before_the_best_checkpoint_leaves_its_evaluation_to_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = callbacks.save_checkpoint

    def killed(model: BaseAlgorithm, folder: Path, *args: Any, **kwargs: Any) -> None:
        if folder.name == "best" and model.num_timesteps == 128:
            raise KeyboardInterrupt
        save(model, folder, *args, **kwargs)

    settings = {"train__eval_freq": 60, "train__save_freq": 60, "train__n_timesteps": 160}
    means = itertools.count()
    monkeypatch.setattr(callbacks, "safe_mean", lambda _: next(means))  # each is the best so far
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            learn(tmp_path, **settings)
    assert evaluated(tmp_path) == [64]
    learn(tmp_path, **settings)
    assert evaluated(tmp_path) == [64, 128, 160]


def test_a_run_frees_the_model_of_the_run_before(tmp_path: Path) -> None:
    before = weakref.ref(learn(tmp_path / "before"))
    learn(tmp_path / "after")
    assert before() is None


def test_no_evaluation_where_none_is_wanted(tmp_path: Path) -> None:
    learn(tmp_path)
    assert not (tmp_path / "evaluations.csv").exists()
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["last"]


def test_a_signal_stops_after_a_checkpoint_of_what_was_learned(tmp_path: Path) -> None:
    model = learn(tmp_path, [SignalAt(80)], train__n_timesteps=1000, train__eval_freq=50)
    assert model.num_timesteps == 80
    assert read_json(tmp_path / "checkpoints" / "last" / "state.json")["num_timesteps"] == 64
    assert evaluated(tmp_path) == [64]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_resumed_run_goes_on_from_there(tmp_path: Path) -> None:
    learn(tmp_path, [SignalAt(80)], train__n_timesteps=160, train__eval_freq=50)
    model = learn(tmp_path, train__n_timesteps=160, train__eval_freq=50)
    assert model.num_timesteps == 160
    assert evaluated(tmp_path) == [64, 128, 160]


def test_an_evaluation_that_a_signal_cut_short_is_made_up_for(tmp_path: Path) -> None:
    class SignalInEvaluation(BaseCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps == 64:
                os.kill(os.getpid(), signal.SIGTERM)

        def _on_step(self) -> bool:
            return True

    learn(tmp_path, [SignalInEvaluation()], train__n_timesteps=160, train__eval_freq=50)
    assert not (tmp_path / "evaluations.csv").exists()
    assert read_json(tmp_path / "checkpoints" / "last" / "state.json")["num_timesteps"] == 64
    learn(tmp_path, train__n_timesteps=160, train__eval_freq=50)
    assert evaluated(tmp_path) == [64, 128, 160]


def test_lines_on_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callbacks, "LINE_SECONDS", 0.0)
    learn(tmp_path, train__n_timesteps=64)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "no game has ended yet" in lines[0]
    assert " 32 steps (50.0%)  mean return of 4 games: " in lines[1]
    assert lines[1].endswith("steps/s")


def test_progress_has_returns_and_the_last_updates_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "LOG_FREQ", 32)
    learn(tmp_path, train__n_timesteps=64)
    with (tmp_path / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["time/total_timesteps"]) for row in rows][:2] == [32, 64]
    for row in rows[:2]:
        assert 0 <= float(row["rollout/ep_rew_mean"]) <= 8
        assert float(row["train/value_loss"]) > 0
        assert float(row["time/fps"]) > 0


def games(folder: Path) -> list[dict[str, str]]:
    with (folder / "episodes.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_whole_game_is_kept(tmp_path: Path) -> None:
    model = learn(tmp_path, [EpisodesCallback(tmp_path)], train__n_timesteps=64)
    rows = games(tmp_path)
    assert list(rows[0]) == ["timesteps", "return", "length", "seconds"]
    # Two environments, whose games take 8 steps each.
    assert [int(row["timesteps"]) for row in rows] == [16, 16, 32, 32, 48, 48, 64, 64]
    assert {row["length"] for row in rows} == {"8"}
    assert model.ep_info_buffer is not None
    assert [float(row["return"]) for row in rows] == [game["r"] for game in model.ep_info_buffer]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    assert 0 <= seconds[0] < 60


def test_a_resumed_run_drops_games_after_its_checkpoint_and_goes_on_counting(
    tmp_path: Path,
) -> None:
    learn(tmp_path, [EpisodesCallback(tmp_path), SignalAt(90)], train__n_timesteps=160)
    assert games(tmp_path)[-1]["timesteps"] == "80"
    rows = games(tmp_path)
    for row in rows:
        row["seconds"] = "1000"
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (tmp_path / "episodes.csv").write_text("\n".join(lines) + "\n")
    learn(tmp_path, [EpisodesCallback(tmp_path)], train__n_timesteps=160)
    rows = games(tmp_path)
    assert [int(row["timesteps"]) for row in rows[::2]] == list(range(16, 161, 16))
    assert rows[7]["timesteps"] == "64", "the checkpoint's step"
    assert all(1000 <= float(row["seconds"]) < 1060 for row in rows[8:])


def test_the_seconds_of_a_run_go_on_from_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "LOG_FREQ", 32)
    learn(tmp_path, [EpisodesCallback(tmp_path), SignalAt(90)], train__n_timesteps=160)
    file = tmp_path / "progress.csv"
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    seconds = [float(row["time/seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    for row in rows:
        row["time/seconds"] = "1000"
    lines_of = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    file.write_text("\n".join(lines_of) + "\n")
    learn(tmp_path, [EpisodesCallback(tmp_path)], train__n_timesteps=160)
    assert all(float(row["seconds"]) >= 1000 for row in games(tmp_path)[8:])
    with file.open() as lines:
        last = list(csv.DictReader(lines))[-1]
    assert last["time/total_timesteps"] == "160"
    assert 1000 <= float(last["time/seconds"]) < 1060


def test_the_end_of_a_run_tells_what_became_of_the_encoders(
    hub5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values: dict[str, Any] = {"hub__name": str(hub5), "hub__freeze": ["b"]}
    model = learn(tmp_path / "run", [EncodersCallback()], hub__always_active=["a"], **values)
    lines = [line for line in capsys.readouterr().out.splitlines() if "encoder" in line]
    assert len(lines) == 5
    assert "encoder a  trained  moved by 0." in lines[0]
    assert "encoder b  frozen   unchanged, the bytes of its file" in lines[1]
    assert model.num_timesteps >= 100
    learn(tmp_path / "random", [EncodersCallback()], hub__random_init=True, **values)
    assert capsys.readouterr().out.count("began with random weights") == 5


def test_the_end_of_a_run_tells_of_the_encoders_of_each_network(
    hub5: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config("sac", {"hub.name": str(hub5)})
    model = build_model(config, small_env(algorithm="sac"))
    model.learn(0, callback=EncodersCallback())
    lines = [line for line in capsys.readouterr().out.splitlines() if "encoder" in line]
    assert [line.split()[2] for line in lines] == [
        f"{network}/{name}" for network in ("actor", "critic") for name in "abcde"
    ]
