"""``hubrl export`` on folders of runs: the graph acts as the agent, the student learns from it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from small_runs import small_config, write_small_config

from agents.algorithms import build_model
from agents.checkpoints import load_checkpoint
from agents.runs import checkpoint_dir, open_run
from hubrl import cli, evaluate, export, train
from hubrl.exporting import distillation
from hubrl.exporting.graph import Acts, acts_of_graph, acts_of_policy
from hubrl.games import make_env
from hubrl.run_folder import read_rows


def trained(folder: Path, hub: object, algorithm: str = "ppo", **overrides: Any) -> Path:
    """The folder of a run of 100 steps."""
    file = write_small_config(folder / "c.yaml", algorithm, hub__name=str(hub), **overrides)
    args = ["--config", str(file), "--run-dir", str(folder / "run")]
    train.command.main(args, standalone_mode=False)
    return folder / "run"


def run(*args: object) -> object:
    with pytest.raises(SystemExit) as exit:
        cli.run(export.command, "hubrl export", [str(arg) for arg in args])
    return exit.value.code


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(1000, *shape), dtype=np.uint8)


def check_graph(folder: Path) -> None:
    """On random images, too, which differ more than those of TinyImage."""
    config = open_run(folder)
    config = config.model_copy(
        update={"hub": config.hub.model_copy(update={"precision": "float32"})}
    )
    agent = build_model(config, make_env(config, 1))
    load_checkpoint(agent, checkpoint_dir(folder, "last"))
    images = random_images(*(agent.observation_space.shape or ()))
    ours = acts_of_graph(folder / "export" / "agent.onnx", images)
    theirs = acts_of_policy(agent.policy, images)
    loudest = np.abs(theirs.scores).max()
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-4, atol=1e-4 * loudest)
    np.testing.assert_allclose(ours.actions, theirs.actions, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("algorithm", "overrides"),
    [
        ("ppo", {"env__id": "hubrl/TinyImageContinuous-v0", "hub__freeze": ["a", "c"]}),
        pytest.param("a2c", {"hub__top_k": 3, "hub__always_active": ["b"]}, marks=pytest.mark.slow),
        pytest.param("dqn", {"hub__aggregation": "concat"}, marks=pytest.mark.slow),
        pytest.param("sac", {"hub__always_active": ["b"]}, marks=pytest.mark.slow),
        pytest.param("maskable_ppo", {"hub__freeze": "all"}, marks=pytest.mark.slow),
        pytest.param(
            "qrdqn", {"hub__top_k": 5, "hub__generator": "uniform"}, marks=pytest.mark.slow
        ),
    ],
)
def test_the_graph_acts_as_the_agent(
    hub5: Path,
    tmp_path: Path,
    algorithm: str,
    overrides: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = trained(tmp_path, hub5, algorithm, **overrides)
    capsys.readouterr()
    assert run(folder, "--format", "onnx") == 0
    output = capsys.readouterr().out
    assert "actions equal the agent's on 1,000 of 1,000 observations" in output
    assert "for a batch of observations [4, 36, 36] uint8 it gives actions" in output
    assert [file.name for file in (folder / "export").iterdir()] == ["agent.onnx"]
    check_graph(folder)


@pytest.mark.slow
def test_encoders_of_other_sizes_are_resized_in_the_graph(
    mixed_hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(tmp_path, mixed_hub, "qrdqn", hub__precision="bfloat16")
    assert run(folder, "--format", "onnx") == 0
    assert "trained in bfloat16, the graph computes in float32: " in capsys.readouterr().out
    check_graph(folder)


@pytest.mark.slow
def test_a_graph_without_hub(tmp_path: Path) -> None:
    folder = trained(tmp_path, "none")
    assert run(folder, "--format", "onnx", "--out", tmp_path / "a.onnx") == 0
    assert not (folder / "export").exists()
    (folder / "export").mkdir()
    (tmp_path / "a.onnx").rename(folder / "export" / "agent.onnx")
    check_graph(folder)


def test_a_graph_that_is_not_the_agent_is_not_kept(
    hub5: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = trained(tmp_path, hub5)
    monkeypatch.setattr(export, "N_OBSERVATIONS", 40)
    monkeypatch.setattr(export, "write_graph", lambda policy, file: file.write_text(""))

    def one_other(file: Path, observations: np.ndarray) -> Acts:
        agent = build_model(config := open_run(folder), make_env(config, 1))
        load_checkpoint(agent, checkpoint_dir(folder, "last"))
        actions, scores = acts_of_policy(agent.policy, observations)
        actions[7] += 1
        return Acts(actions, scores)

    observations = random_images(4, 36, 36)[:40]
    monkeypatch.setattr(export, "_observations", lambda agent, seed: observations)
    monkeypatch.setattr(export, "acts_of_graph", one_other)
    assert run(folder, "--format", "onnx") == 1
    captured = capsys.readouterr()
    assert "actions equal the agent's on 39 of 40" in captured.out
    assert captured.err == "hubrl export: error: the graph is not the agent; nothing is written\n"
    assert not list((folder / "export").iterdir())


def test_a_student_that_sees_the_same_images_plays_the_same_games() -> None:
    """So that games need not replay."""
    config = small_config(overrides={"env.id": "ALE/Breakout-v5", "hub.name": "atari5"})
    teacher: Any = SimpleNamespace(get_env=lambda: "its games")
    student = export._student_config(config, 128)
    assert export._student_env(teacher, config, student) == "its games"


@pytest.mark.slow
def test_a_student_learns_from_its_teacher(
    hub5: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distillation, "BATCH", 32)  # a student sees images of 84 pixels
    monkeypatch.setattr(export, "N_TEST_STEPS", 16)
    folder = trained(tmp_path, hub5, train__n_timesteps=256)
    capsys.readouterr()
    assert run(folder, "--format", "distilled", "-n", 512, "--episodes", 4) == 0
    output = capsys.readouterr().out
    student = folder / "export" / "distilled"
    report = json.loads((student / "report.json").read_text())
    rows = read_rows(student / "losses.csv")
    assert [int(row["frames"]) for row in rows] == [128, 256, 384, 512]
    assert float(rows[-1]["kl"]) < 0.5 * float(rows[0]["kl"])
    assert report["final"]["accuracy"] > 0.9
    assert report["n_steps"] == 512
    for name in ("teacher", "student"):
        assert len(report[name]["returns"]) == 4
        low, high = report[name]["interval_95"]
        mean = report[name]["mean_return"]
        assert low <= mean <= high
        assert (
            f"{name}: 4 games: mean return {mean:.2f} (95% interval {low:.2f} to {high:.2f})"
            in (output)
        )
    assert report["seconds_per_predict"]["batch_8"]["ratio"] > 0
    assert (student / "losses.png").stat().st_size > 10_000
    assert not [file for file in student.rglob("*") if file.suffix in (".zip", ".pkl", ".pth")]
    assert [file.name for file in student.parent.iterdir()] == ["distilled"]
    check_it_evaluates(student, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sac", "maskable_ppo"])
def test_students_of_other_algorithms(
    hub5: Path,
    tmp_path: Path,
    algorithm: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distillation, "BATCH", 32)
    monkeypatch.setattr(export, "N_TEST_STEPS", 16)
    folder = trained(tmp_path, hub5, algorithm)
    assert run(folder, "--format", "distilled", "-n", 256, "--episodes", 2) == 0
    student = folder / "export" / "distilled"
    report = json.loads((student / "report.json").read_text())
    assert [len(report[name]["returns"]) for name in ("teacher", "student")] == [2, 2]
    check_it_evaluates(student, capsys, n_steps=256)
    assert run(student, "--format", "onnx") == 0
    assert "actions equal the agent's on 1,000 of 1,000" in capsys.readouterr().out


def check_it_evaluates(
    student: Path, capsys: pytest.CaptureFixture[str], n_steps: int = 512
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.run(evaluate.command, "hubrl evaluate", [str(student), "--episodes", "2"])
    assert exit.value.code == 0
    output = capsys.readouterr().out
    assert f"last checkpoint at {n_steps} steps, 2 games: mean return" in output
    assert json.loads((student / "evaluation.json").read_text())["hub"] == "none"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere", "--format", "onnx"], "nowhere is not the folder of a run: it has no config"),
        (["RUN"], "Missing option '--format'"),
        (["RUN", "--format", "onyx"], "'onyx' is not one of 'onnx', 'distilled'"),
        (["RUN", "--format", "distilled"], "has hub 'none': its agent is one encoder already"),
        (["RUN", "--format", "distilled", "-n", "127"], "127 is not in the range x>=128"),
        (["RUN", "--format", "onnx", "-n", "128"], "-n and --episodes have no meaning with"),
        (["RUN", "--format", "onnx", "--out", "no/a.onnx"], "--out no/a.onnx: there is no folder"),
        (["RUN", "--format", "onnx", "--out", "."], "--out . is a folder, but a graph is a file"),
        (["RUN", "--format", "onnx", "--checkpoint", "best"], "there is no checkpoint in"),
    ],
)
def test_wrong_input(
    plain_run: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*[str(plain_run) if arg == "RUN" else arg for arg in args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (plain_run / "export").exists()


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a hub."""
    return trained(tmp_path_factory.mktemp("plain"), "none", train__n_timesteps=32)


def test_distilled_refuses_a_folder_with_files(hub5: Path, tmp_path: Path) -> None:
    folder = trained(tmp_path, hub5, train__n_timesteps=32)
    (folder / "export" / "distilled").mkdir(parents=True)
    (folder / "export" / "distilled" / "mine").write_text("")
    assert run(folder, "--format", "distilled") == 2
    assert [file.name for file in folder.glob("export/**/*")] == ["distilled", "mine"]


@pytest.mark.slow
def test_a_student_is_as_good_as_a_teacher_that_has_learned(hub5: Path, tmp_path: Path) -> None:
    overrides = {"train__n_timesteps": 6000, "algorithm__n_steps": 64, "algorithm__batch_size": 64}
    overrides["algorithm__n_epochs"] = 4
    folder = trained(tmp_path, hub5, algorithm__learning_rate=1e-3, **overrides)
    assert run(folder, "--format", "distilled", "-n", 4096, "--episodes", 50) == 0
    report = json.loads((folder / "export" / "distilled" / "report.json").read_text())
    teacher, student = (report[name]["mean_return"] for name in ("teacher", "student"))
    assert teacher > 6.0
    assert abs(teacher - student) < 1.0
