"""``hubrl train`` from the command line to the run folder."""

from __future__ import annotations

import csv
import dataclasses
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from small_runs import write_small_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.config import load_config
from envs import ImageFormat
from hubrl import cli, train
from hubrl.files import read_json
from hubrl.games import image_format
from hubrl.run_folder import held
from hubrl.specs import load_hub, save_hub

FILES = {".lock", "config.yaml", "command.txt", "checkpoints"} | {
    f"{name}.csv" for name in ("progress", "evaluations", "episodes")
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("agents.callbacks.LOG_FREQ", 32)


def run(*args: object) -> object:
    with pytest.raises(SystemExit) as exit:
        cli.run(train.command, "hubrl train", [str(arg) for arg in args])
    return exit.value.code


def last(folder: Path) -> dict[str, Any]:
    return load_file(folder / "checkpoints" / "last" / "policy.safetensors")


def rows(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
@pytest.mark.parametrize("hub", ["none", "hub5"])
def test_a_run_with_all_its_files(algorithm: str, hub: str, hub5: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", algorithm)
    code = run("--config", config, "--hub", hub, "--run-dir", "r", "--eval-freq", 50, "--n-envs", 1)
    assert code == 0
    names = {path.name for path in Path("r").iterdir()}
    (events,) = names - FILES
    assert events.startswith("events.out.tfevents.")
    assert names - {events} == FILES
    assert read_json(Path("r/checkpoints/last/state.json"))["num_timesteps"] >= 100
    assert read_json(Path("r/checkpoints/best/state.json"))["num_timesteps"] >= 50
    assert list(rows(Path("r/evaluations.csv"))[0]) == ["timesteps", "episode", "return", "length"]
    logged = EventAccumulator("r")
    logged.Reload()
    scalars = logged.Tags()["scalars"]
    expected = ["rollout/ep_rew_mean", "time/fps", "eval/mean_reward"]
    if hub == "hub5":
        expected += [f"pathway/usage_{name}" for name in "abcde"]
        expected += ["pathway/entropy", "pathway/exploration_loss"]
    assert set(expected) <= set(scalars)
    saved = yaml.safe_load(Path("r/config.yaml").read_text())
    assert saved["env"]["n_envs"] == 1
    assert saved["hub"]["name"] == (str(hub5) if hub == "hub5" else "none")
    pickles = (".zip", ".pkl", ".pt", ".pth")
    assert not [path for path in Path("r").rglob("*") if path.suffix in pickles]


@pytest.mark.parametrize("algorithm", ["ppo", pytest.param("dqn", marks=pytest.mark.slow)])
def test_a_saved_configuration_repeats_the_run(algorithm: str, hub5: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml", algorithm)
    assert run("--config", config, "--hub", hub5, "--seed", 3, "--run-dir", "a") == 0
    assert run("--config", "a/config.yaml", "--run-dir", "b", "--eval-freq", 40) == 0
    assert run("--config", "a/config.yaml", "--run-dir", "c", "--seed", 4) == 0
    a, b, c = last(Path("a")), last(Path("b")), last(Path("c"))
    assert all(a[key].equal(b[key]) for key in a), "evaluations don't change what is learned"
    assert not all(a[key].equal(c[key]) for key in a)


def test_options_win_over_the_file(hub5: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml")
    options = ["--hub", hub5, "--top-k", 3, "--freeze", "a", "--freeze", "b", "-n", "64"]
    options += ["--exploration-coef", "0.2", "--random-init", "--save-freq", 32, "--device", "cpu"]
    options += ["--freeze-layers", "1"]
    assert run("--config", config, "--run-dir", "r", *options) == 0
    resolved = load_config(Path("r/config.yaml"))
    assert resolved.train.n_timesteps == 64
    assert resolved.hub.top_k == 3
    assert resolved.hub.freeze == ("a", "b")
    assert resolved.hub.freeze_layers == 1
    assert resolved.hub.random_init
    assert resolved.hub.exploration_coef(0.5) == 0.2
    assert (resolved.train.save_freq, resolved.train.eval_freq) == (32, 0)
    assert resolved.train.device == "cpu"


def test_a_run_too_short_to_learn_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_small_config(tmp_path / "c.yaml")
    assert run("--config", config, "-n", 32) == 0
    assert capsys.readouterr().err.startswith("nothing is learned in 32 steps: ")
    assert run("--config", config, "-n", 64, "--run-dir", "r") == 0
    assert capsys.readouterr().err == ""


def test_one_encoder_of_a_hub(hub5: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml")
    assert run("--config", config, "--run-dir", "r", "--hub", f"{hub5}:b") == 0
    assert load_config(Path("r/config.yaml")).hub.top_k == 1


def test_any_setting_by_option(hub5: Path, tmp_path: Path) -> None:
    config = write_small_config(tmp_path / "c.yaml")
    options = ["--set", "hub.freeze=[a, b]", "--set", "algorithm.learning_rate={linear: 1e-3}"]
    options += ["--set", "algorithm.n_epochs=1", "--set", "env.timeout=null"]
    assert run("--config", config, "--run-dir", "r", "--hub", hub5, "--seed", 1, *options) == 0
    resolved = load_config(Path("r/config.yaml"))
    assert resolved.hub.freeze == ("a", "b")
    assert (resolved.algorithm.learning_rate.start, resolved.algorithm.learning_rate.end) == (
        1e-3,
        0.0,
    )
    assert (resolved.algorithm.n_epochs, resolved.env.timeout) == (1, None)


def test_a_hub_by_set_is_one_by_option(hub5: Path, tmp_path: Path) -> None:
    """Whatever hub the file is of."""
    values = {"hub__name": str(hub5), "hub__top_k": 2, "hub__always_active": ["a"]}
    config = write_small_config(tmp_path / "c.yaml", **values)
    for i, options in enumerate((["--hub", f"{hub5}:b"], ["--set", f"hub.name={hub5}:b"])):
        assert run("--config", config, "--run-dir", f"r{i}", *options) == 0
        hub = load_config(Path(f"r{i}/config.yaml")).hub
        assert (hub.top_k, hub.always_active) == (1, ())
    back = ["--config", "r0/config.yaml", "--hub", hub5]  # whose top_k is 1
    assert run(*back, "--run-dir", "whole") == 0
    assert load_config(Path("whole/config.yaml")).hub.top_k == 2


def test_always_active_encoders_by_option(hub5: Path, tmp_path: Path) -> None:
    save_hub(dataclasses.replace(load_hub(hub5), always_active=("c",)), hub5)
    file = write_small_config(tmp_path / "c.yaml", hub__name=str(hub5), hub__always_active=["a"])
    cases = {
        (): ("a",),
        ("--always-active", "b", "--aggregation", "concat"): ("b",),
        ("--always-active", "none"): (),
        ("--hub", str(hub5)): ("c",),  # the file's name may be of another hub
        ("--hub", f"{hub5}:b"): (),
    }
    for i, (options, expected) in enumerate(cases.items()):
        assert run("--config", file, "--run-dir", f"r{i}", "-n", 32, *options) == 0
        hub = load_config(Path(f"r{i}/config.yaml")).hub
        assert hub.always_active == expected
        assert hub.aggregation == ("concat" if "concat" in options else "sum")


def test_the_default_run_dir_tells_what_it_is(tmp_path: Path) -> None:
    assert run("--config", write_small_config(tmp_path / "c.yaml"), "--seed", 5) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("ppo-hubrl_TinyImage-v0-none-s5-")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_then_resume(
    number: int,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Stopper(train.ProgressCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 80:
                os.kill(os.getpid(), number)
            return True

    config = write_small_config(tmp_path / "c.yaml", train__n_timesteps=160)
    with monkeypatch.context() as patch:
        patch.setattr(train, "ProgressCallback", Stopper)
        assert run("--config", config, "--run-dir", "r") == code
    output = capfd.readouterr()
    assert output.out.endswith("\nstopped at 82 steps; --resume r goes on\n")
    assert output.err == "stopping where the run can go on; a second signal stops it at once\n"
    assert read_json(Path("r/checkpoints/last/state.json"))["num_timesteps"] == 64
    before, text = last(Path("r")), Path("r/config.yaml").read_text()

    assert run("--resume", "r") == 0
    assert capfd.readouterr().out.startswith("goes on at 64 steps\nrun folder: r\n")
    state = read_json(Path("r/checkpoints/last/state.json"))
    assert state["num_timesteps"] == 160
    assert state["_n_updates"] == 5
    assert not all(last(Path("r"))[key].equal(before[key]) for key in before)
    assert Path("r/config.yaml").read_text() == text
    assert len(Path("r/command.txt").read_text().splitlines()) == 2
    logged = [int(row["time/total_timesteps"]) for row in rows(Path("r/progress.csv"))]
    assert logged == sorted(logged)
    assert {32, 64, 96, 128, 160} <= set(logged)
    rates = {
        row["time/total_timesteps"]: row["train/learning_rate"]
        for row in rows(Path("r/progress.csv"))
    }
    assert float(rates["96"]) == pytest.approx(2.5e-4 * 64 / 160), "the schedule goes on, too"


def test_resuming_before_the_first_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_small_config(tmp_path / "c.yaml")
    Path("r").mkdir()
    config.rename("r/config.yaml")
    assert run("--resume", "r") == 0
    assert capsys.readouterr().out.startswith("no checkpoint yet: begins anew\nrun folder: r\n")


def test_resuming_a_complete_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--config", write_small_config(tmp_path / "c.yaml"), "--run-dir", "r") == 0
    assert run("--resume", "r") == 0
    assert capsys.readouterr().out.endswith(
        "r is complete: 128 steps; --resume r -n N makes it longer\n"
    )


def test_a_longer_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Schedules fall over the new number of steps from where the run is."""
    config = write_small_config(tmp_path / "c.yaml", algorithm__learning_rate={"linear": 1e-3})
    assert run("--config", config, "--run-dir", "r") == 0
    before = Path("r/config.yaml").read_text()
    for few in (128, 0, "many"):
        assert run("--resume", "r", "-n", few) == 2
    error = capsys.readouterr().err
    assert "-n 128, but r has made 128 steps: give more" in error
    assert "train.n_timesteps is '0', allowed: a whole number at least 1" in error
    assert "train.n_timesteps is 'many', allowed: a whole number" in error
    assert Path("r/config.yaml").read_text() == before
    assert run("--resume", "r", "-n", "256") == 0
    assert "goes on at 128 steps\n" in capsys.readouterr().out
    assert load_config(Path("r/config.yaml")).train.n_timesteps == 256
    logged = {row["time/total_timesteps"]: row for row in rows(Path("r/progress.csv"))}
    assert float(logged["192"]["train/learning_rate"]) == pytest.approx(1e-3 * 64 / 256)
    assert run("--resume", "r") == 0
    assert "r is complete: 256 steps" in capsys.readouterr().out


@pytest.fixture(scope="module")
def two_complete_and_one_killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two complete runs and one that was killed, the newest."""
    folder = tmp_path_factory.mktemp("made")
    config = write_small_config(folder / "c.yaml", train__save_freq=32)
    for name, steps in (("shorter", 64), ("whole", 96)):
        assert run("--config", config, "-n", steps, "--run-dir", folder / "runs" / name) == 0
    shutil.copytree(folder / "runs" / "whole", folder / "runs" / "cut")
    last = folder / "runs" / "cut" / "checkpoints" / "last"
    shutil.rmtree(last)
    last.with_name("last.1").rename(last)
    return folder


class TestTheSameCommandAgain:
    """It finds its own unfinished run."""

    @pytest.fixture
    def command(self, two_complete_and_one_killed: Path, tmp_path: Path) -> list[object]:
        """That of the two runs that are alike."""
        shutil.copytree(two_complete_and_one_killed, tmp_path, dirs_exist_ok=True)
        os.utime(tmp_path / "runs" / "cut")
        return ["--config", tmp_path / "c.yaml", "-n", 96]

    def steps(self) -> dict[str, int]:
        folders = sorted(Path("runs").iterdir())
        names = [re.sub("^ppo-.*", "new", folder.name) for folder in folders]
        states = [read_json(folder / "checkpoints" / "last" / "state.json") for folder in folders]
        return dict(zip(names, (state["num_timesteps"] for state in states), strict=True))

    def test_auto(self, command: list[object], capsys: pytest.CaptureFixture[str]) -> None:
        assert self.steps() == {"cut": 64, "shorter": 64, "whole": 96}
        assert run(*command, "--resume", "auto") == 0
        assert self.steps() == {"cut": 96, "shorter": 64, "whole": 96}
        cut, whole = last(Path("runs/cut")), last(Path("runs/whole"))
        assert all(cut[key].equal(whole[key]) for key in whole)
        assert run(*command, "--resume", "auto", "--run-dir", "runs/cut") == 0
        assert "\nruns/cut is complete: 96 steps; --resume" in capsys.readouterr().out
        assert run(*command, "--resume", "auto") == 0
        assert self.steps() == {"cut": 96, "new": 96, "shorter": 64, "whole": 96}

    def test_scripts_are_told(
        self, command: list[object], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(*command) == 0
        assert "runs/cut is an unfinished run like this; --resume auto" in capsys.readouterr().out
        assert self.steps()["new"] == 96

    @pytest.mark.parametrize(("answer", "cut"), [("y", 96), ("", 96), ("n", 64)])
    def test_people_are_asked(
        self, answer: str, cut: int, command: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        asked: list[str] = []

        def confirm(text: str, default: bool) -> bool:
            asked.append(text)
            return {"y": True, "n": False}.get(answer, default)

        monkeypatch.setattr("click.confirm", confirm)
        assert run(*command) == 0
        assert asked == ["runs/cut is unfinished: continue it?"]
        assert self.steps()["cut"] == cut
        assert ("new" in self.steps()) == (answer == "n")

    def test_not_of_another_configuration(
        self, command: list[object], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(*command, "--seed", 1, "--resume", "auto", "--run-dir", "runs/cut") == 2
        assert "run-dir runs/cut exists; give another" in capsys.readouterr().err

    def test_not_of_a_run_whose_only_checkpoint_is_damaged(self, command: list[object]) -> None:
        Path("runs/cut/checkpoints/last/policy.safetensors").unlink()
        assert run(*command, "--resume", "auto", "--run-dir", "runs/anew") == 0
        assert run(*command, "--resume", "auto") == 0
        assert len(list(Path("runs").iterdir())) == 5

    def test_other_folders_are_left_as_they_are(self, command: list[object]) -> None:
        other, alike = Path("runs/other"), Path("runs/whole")
        other.mkdir()
        (other / "config.yaml").write_bytes(b"name: \xe4\n")
        (alike / ".lock").unlink()
        assert run(*command, "--resume", "auto") == 0
        assert [file.name for file in other.iterdir()] == ["config.yaml"]
        assert not (alike / ".lock").exists()

    def test_not_of_a_run_that_is_going_on(self, command: list[object]) -> None:
        with held(Path("runs/cut")):
            assert run(*command, "--resume", "auto") == 0
        assert self.steps() == {"cut": 64, "new": 96, "shorter": 64, "whole": 96}


def test_a_full_disk_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_small_config(tmp_path / "c.yaml", "a2c")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hubrl.state_folder.write_tensors", full)
        assert run("--config", config, "--run-dir", "r") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "checkpoints/last can't be written" in error
    assert "No space left on device" in error


def test_an_evaluation_that_a_signal_cut_short_is_made_up_for(tmp_path: Path) -> None:
    file = write_small_config(tmp_path / "c.yaml", train__eval_freq=64)
    assert run("--config", file, "--run-dir", "r") == 0
    evaluations = Path("r/evaluations.csv")
    complete = rows(evaluations)
    kept = [row for row in complete if row["timesteps"] != complete[-1]["timesteps"]]
    evaluations.write_text("".join(evaluations.read_text().splitlines(True)[: len(kept) + 1]))
    assert run("--resume", "r") == 0
    assert [row["timesteps"] for row in rows(evaluations)] == [r["timesteps"] for r in complete]


HUB_MESSAGES = [
    (["--hub", "HUB", "--top-k", "6"], "top_k"),
    (["--hub", "HUB", "--freeze", "z"], "freeze: hub 'hub5' has no encoder 'z'"),
    (["--hub", "HUB", "--freeze-layers", "-1"], "hub.freeze_layers is '-1', allowed: a whole"),
    (["--hub", "HUB", "--freeze-layers", "3"], "freeze_layers is 3, allowed: 0..2 for encoder 'a'"),
    (["--hub", "HUB", "--always-active", "z"], "always_active: hub 'hub5' has no encoder 'z'"),
    (
        ["--hub", "HUB", "--always-active", "a", "--top-k", "1"],
        "always_active is a, but top_k is 1",
    ),
    (
        ["--hub", "HUB", "--aggregation", "mean"],
        "hub.aggregation is 'mean', allowed: 'auto', 'concat' or",
    ),
    (["--hub", "HUB:z"], "has no encoder 'z'"),
    (["--hub", "atarii5"], "hub 'atarii5' is unknown"),
]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--env", "ALE/Breakot-v5", "--hub", "none"], "(closest: ALE/Breakout-v5"),
        (["--env", "TinyImage"], "env 'TinyImage' is not registered"),
        (["--env", "CartPole-v1"], "but only images are allowed"),
        (["--algo", "pppo"], "algorithm.name is 'pppo' (closest: 'ppo')"),
        (["--algo", "trpo"], "'trpo' can't train a hub: it differentiates the KL"),
        (["--algo", "dqn", "--config", "c.yaml"], "--algo dqn, but c.yaml is for ppo"),
        (["-n", "0"], "train.n_timesteps is '0', allowed: a whole number at least 1"),
        (["--sticky", "2"], "env.sticky is '2', allowed: a number at least 0 and at most 1"),
        (["--top-k", "0", "--hub", "none"], "--top-k has no meaning with --hub none"),
        (["--random-init", "--hub", "none"], "--random-init has no meaning with --hub none"),
        (["--config", "c.yaml", "--freeze", "a"], "--freeze has no meaning with --hub none"),
        (["--device", "gpu"], "train.device is 'gpu', allowed on this machine: auto, cpu"),
        (["--config", "missing.yaml"], "'--config': File 'missing.yaml' does not exist"),
        (["--seeed", "1"], "No such option"),
        (
            ["--set", "algorithm.name=a2c"],
            "--set algorithm.name: the algorithm is chosen by",
        ),
        (["--set", "hub.top_k"], "--set hub.top_k: give SECTION.KEY=VALUE"),
        (["--set", "hubb.top_k=1"], "--set has the key 'hubb.top_k' (closest: 'hub'), allowed: S"),
        (
            ["--set", "hub.freeze_layers=1"],
            "--set hub.freeze_layers has no meaning with",
        ),
        (["--seed", "1", "--set", "train.seed=2"], "--set train.seed: it is given twice"),
        (["--set", "train.seed=1", "--set", "train.seed=2"], "--set train.seed: it is given twice"),
        (
            ["--hub", "HUB", "--set", "hub.exploration_coef={no: 3}"],
            "--set hub.exploration_coef has the key False, allowed: text; quote it",
        ),
        (["--hub", "HUB:a", "--set", "hub.top_k=2"], "top_k is 2, allowed: 1..1, the number of"),
        (["--hub", "HUB", "--set", "hub.topk=1"], "unknown key hub.topk (closest: 'top_k')"),
        (["--hub", "HUB", "--set", "hub.top_k=x"], "hub.top_k is 'x', allowed: a whole number at"),
        (["--set", "hub.freeze=[a"], "--set hub.freeze is not valid YAML"),
        (["--run-dir", "used"], "run-dir used exists"),
        (["--resume", "used"], "used is not the folder of a run"),
        (["--resume", "used", "--seed", "1"], "--seed and --resume"),
        (["--resume", "used", "--set", "hub.top_k=1"], "--set and --resume"),
        *HUB_MESSAGES,
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    args: list[str],
    message: str,
    hub5: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_small_config(Path("c.yaml"))
    Path("used").mkdir()
    Path("used/file").touch()
    before = sorted(tmp_path.rglob("*"))
    if not {"--config", "--algo", "--resume"} & set(args):
        args = ["--config", "c.yaml", *args]
    if "--run-dir" not in args and "--resume" not in args:
        args = ["--run-dir", "new", *args]
    assert run(*[arg.replace("HUB", str(hub5)) for arg in args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("hubrl train: error: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_broken_weight_file_is_one_line(
    hub5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = hub5 / "c.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    config = write_small_config(tmp_path / "c.yaml")
    assert run("--config", config, "--hub", hub5, "--run-dir", "r") == 2
    assert "sha256" in capsys.readouterr().err
    assert not Path("r").exists()


def test_errors_while_learning_are_not_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> bool:
        raise ValueError("a bug")

    monkeypatch.setattr(train.ProgressCallback, "_on_step", fail)
    with pytest.raises(ValueError, match="a bug"):
        train.command.main(
            ["--config", str(write_small_config(tmp_path / "c.yaml"))], standalone_mode=False
        )


@pytest.mark.parametrize(
    "algorithm",
    ["ppo", "qrdqn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("a2c", "dqn"))],
)
def test_atari_with_the_shipped_configuration(algorithm: str) -> None:
    args = ["--algo", algorithm, "--env", "ALE/Pong-v5", "--hub", "none", "-n", 256]
    assert run(*args, "--n-envs", 2, "--eval-freq", 0, "--run-dir", "r") == 0
    assert read_json(Path("r/checkpoints/last/state.json"))["num_timesteps"] == 256 + 4 * (
        algorithm == "a2c"
    )


def test_images_too_small_for_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--env", "hubrl/TinyImage-v0", "--hub", "atari5", "--run-dir", "r") == 2
    error = capsys.readouterr().err
    assert "observes images of 36x36 px, but at least 42x42 px are needed" in error
    assert not Path("r").exists()


def test_a_mixed_hub_gets_grey_images_of_its_largest_size(mixed_hub: Path) -> None:
    assert image_format(str(mixed_hub)) == ImageFormat(size=44, grey=True, stack=4, min_size=22)


def test_libraries_keep_few_kernels_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert run("--env", "nothing") == 2
    assert [os.environ[name] for name in names] == ["128", "128"]
    monkeypatch.setenv(names[0], "7")
    assert run("--env", "nothing") == 2
    assert os.environ[names[0]] == "7"


def test_a_hubs_format_asks_for_half_of_its_size() -> None:
    assert image_format("atari5").min_size == 42
    assert image_format("none").min_size == 1
