"""``hubrl study``: which runs it starts and how; a study from the command to its results."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from small_runs import renew_manifest, small_config, small_study, write_small_config

from hubrl import cli, study
from hubrl.signals import StopSignal
from hubrl.studies import engines
from hubrl.studies.config import Run

GAME = "hubrl/TinyImage-v0"
FAKE_TRAINING = """#!{python} -S
import json, os, pathlib, signal, sys, time
arguments = sys.argv[3:]
folder = pathlib.Path(arguments[-1])
facts = [" ".join(arguments), os.environ["OMP_NUM_THREADS"], os.nice(0)]
with open("{calls}", "a") as file:
    file.write(json.dumps(facts) + "\\n")
if "/broken/" in str(folder):
    print("no such thing")
    sys.exit(3)
def stop(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.3)
    session = pathlib.Path("/proc/self/autogroup")
    pathlib.Path("{calls}.session").write_text(session.read_text() if session.exists() else "")
    print("stopped")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
if "/slow/" in str(folder):
    pathlib.Path("{calls}.slow").touch()
    time.sleep(60)
last = folder / "checkpoints" / "last"
last.mkdir(parents=True, exist_ok=True)
if "--config" in arguments:
    (folder / "config.yaml").write_text(pathlib.Path(arguments[1]).read_text())
(last / "state.json").write_text(json.dumps(dict(num_timesteps=64)))
(last / "manifest.json").write_text("{}")
(folder / "episodes.csv").write_text("timesteps,return,length,seconds\\n16,1,8,1\\n64,2,8,4\\n")
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engines, "POLL_SECONDS", 0.01)


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[Any]]]:
    """Training is faked: what each process was called with, its threads and its niceness."""
    python, log = tmp_path / "python", tmp_path / "calls"
    python.write_text(
        FAKE_TRAINING.replace("{python}", sys.executable).replace("{calls}", str(log))
    )
    python.chmod(0o755)
    monkeypatch.setattr(engines.sys, "executable", str(python))
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results have their tables alone: drawing takes most of the time."""
    monkeypatch.setattr(study, "draw", lambda *_: None)


def run(*args: object) -> object:
    with pytest.raises(SystemExit) as exit:
        cli.run(study.command, "hubrl study", [str(arg) for arg in args])
    return exit.value.code


def variants(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {} for name in names}


def folder_of(variant: str, seed: int = 0) -> Path:
    return Path("studies/small/runs") / Run(variant, GAME, seed).path


def set_timesteps(folder: Path, timesteps: int) -> None:
    state = folder / "checkpoints" / "last" / "state.json"
    state.parent.mkdir(parents=True, exist_ok=True)
    state.write_text(json.dumps({"num_timesteps": timesteps}))
    renew_manifest(state.parent)


Calls = Callable[[], list[list[Any]]]


def test_processes_share_the_cores_at_low_priority(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(engines, "n_cores", lambda: 7)
    assert run(small_study(tmp_path, seeds=[0, 1]), "--only", "run", "--jobs", 2) == 0
    assert len(calls()) == 4
    niceness = min(os.nice(0) + engines.NICENESS, 19)
    assert {(threads, nice) for _, threads, nice in calls()} == {("3", niceness)}
    config, folder = tmp_path / "studies/small/jobs", tmp_path / "studies/small/runs"
    path = Run("fast", GAME, 1).path
    expected = f"--config {config / path}.yaml --run-dir {folder / path}"
    assert expected in [arguments for arguments, *_ in calls()]
    facts = json.loads((config / "fast/hubrl_TinyImage-v0/s1.json").read_text())
    assert facts["commit"]
    assert not Path("docs").exists()


@pytest.mark.parametrize(
    ("omp_num_threads", "jobs", "shares"),
    [
        (None, None, (7, 1)),
        (None, 2, (2, 3)),
        (None, 9, (9, 1)),
        ("2", None, (3, 2)),
        ("1", 2, (2, 1)),
        ("8", None, (1, 8)),
        ("4,2", None, (1, 4)),
        ("0", 2, (2, 3)),
        ("many", 2, (2, 3)),
    ],
)
def test_the_environment_may_say_how_many_threads_a_process_takes(
    omp_num_threads: str | None,
    jobs: int | None,
    shares: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp_num_threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    monkeypatch.setattr(engines, "n_cores", lambda: 7)
    assert engines.share_cores(jobs) == shares


def test_complete_runs_are_skipped_and_unfinished_ones_resumed(
    calls: Calls, tmp_path: Path
) -> None:
    file = small_study(tmp_path, variants=variants("none", "a", "b"))
    assert run(file, "--only", "run") == 0
    set_timesteps(folder_of("a"), 32)
    shutil.rmtree(folder_of("b") / "checkpoints/last")
    Path("calls").unlink()
    assert run(file, "--only", "run", "--jobs", 1) == 0
    resumed, anew = (arguments for arguments, *_ in calls())
    assert resumed == f"--resume {folder_of('a').absolute()}"
    assert anew.startswith("--config ")
    assert anew.endswith(f" --run-dir {folder_of('b').absolute()}")
    Path("calls").unlink()
    assert run(file, "--only", "run") == 0
    assert not Path("calls").exists()


def test_a_failing_run_does_not_stop_the_others(
    calls: Calls,
    tmp_path: Path,
    no_figures: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = small_study(tmp_path, variants=variants("broken", "none"))
    assert run(file, "--jobs", 1) == 1
    assert len(calls()) == 2
    log = tmp_path / "studies/small/jobs/broken/hubrl_TinyImage-v0/s0.txt"
    message = f"FAILED broken, {GAME}, seed 0: exit code 3, {log}: no such thing\n"
    assert message in capsys.readouterr().err
    report = Path("docs/studies/small/report.md").read_text()
    assert f"**Not complete:** broken, {GAME}, seed 0." in report


def test_without_the_control_there_are_no_results(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = small_study(tmp_path, variants=variants("broken", "none"), control="broken")
    assert run(file) == 1
    message = f"no results: the control 'broken' has no complete run of {GAME}"
    assert message in capsys.readouterr().err
    assert run(file, "--only", "collect") == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_runs(
    number: int, code: int, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def send() -> None:
        deadline = time.monotonic() + 30
        while not Path("calls.slow").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    file = small_study(tmp_path, variants=variants("slow", "none"), control="none")
    assert run(file, "--jobs", 1) == code
    assert len(calls()) == 1, "nothing new was started"
    log = Path("studies/small/jobs/slow/hubrl_TinyImage-v0/s0.txt")
    assert log.read_text() == "stopped\n"
    session = Path("calls.session").read_text()
    assert not session or session.endswith(f"nice {engines.NICENESS}\n")
    output = capsys.readouterr()
    assert "stopped; the same command goes on in studies/small" in output.out
    assert "FAILED" not in output.err
    assert not Path("docs").exists()


def test_a_session_has_a_low_priority_among_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/autogroup").exists():
        pytest.skip("this machine shares the processor out to processes, not to sessions")
    write, refusals = Path.write_text, [BlockingIOError(), BlockingIOError()]

    def refused_twice(path: Path, text: str) -> int:
        if refusals:
            raise refusals.pop()
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", refused_twice)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        engines._lower_session(process.pid)
        assert Path(f"/proc/{process.pid}/autogroup").read_text().endswith("nice 10\n")
        process.kill()
    engines._lower_session(process.pid)  # it has ended


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it runs on
def test_a_second_signal_leaves_the_trainings_to_their_checkpoints(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Path("studies/small/jobs/slow/hubrl_TinyImage-v0/s0.txt")

    def send() -> None:
        deadline = time.monotonic() + 30
        while not Path("calls.slow").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    thread = threading.Thread(target=send)
    thread.start()
    file = small_study(tmp_path, variants=variants("slow", "none"), control="none")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        cli.run(study.command, "hubrl study", [str(file), "--jobs", "1"])
    thread.join()
    assert "stopping: 1 trainings save a checkpoint" in capsys.readouterr().out
    deadline = time.monotonic() + 10
    while log.read_text() != "stopped\n" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert log.read_text() == "stopped\n"


def test_one_study_at_a_time_in_a_folder(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = small_study(tmp_path)
    Path("o").mkdir()
    with Path("o/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(file, "--out", "o") == 2
    assert "is still at work in o: wait or stop it" in capsys.readouterr().err
    assert run(file, "--out", "o", "--only", "run") == 0


def test_a_changed_study_does_not_mix_with_old_runs(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    concat = {"hub.aggregation": "concat"}
    assert run(small_study(tmp_path, overrides=concat), "--only", "run") == 0
    changed = small_study(tmp_path, overrides={**concat, "algorithm.gamma": 0.5})
    assert run(changed, "--only", "run") == 2
    message = "has algorithm.gamma 0.99, but the study says 0.5: give another --out, or delete"
    assert message in capsys.readouterr().err
    config = folder_of("none") / "config.yaml"
    old = config.read_text().replace("  aggregation: concat\n", "")
    config.write_text(old)
    same = small_study(tmp_path, overrides=concat)
    assert run(same, "--only", "run") == 0, "what runs did before there was the key"
    changed = small_study(tmp_path, overrides={"hub.aggregation": "sum"})
    assert run(changed, "--only", "run") == 2
    assert "has hub.aggregation 'concat', but the study says 'sum'" in capsys.readouterr().err


def test_results_are_those_of_the_settings_that_were_trained(
    calls: Calls,
    tmp_path: Path,
    no_figures: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(small_study(tmp_path), "--only", "run") == 0
    changed = small_study(tmp_path, overrides={"algorithm.gamma": 0.5})
    assert run(changed, "--only", "collect") == 2
    assert "has algorithm.gamma 0.99, but the study says 0.5" in capsys.readouterr().err
    assert run(small_study(tmp_path, n_timesteps=32), "--only", "collect") == 0
    report = Path("docs/studies/small/report.md").read_text()
    assert "**Some runs have 64 agent steps,** of which the first 32 are measured" in report
    longer = small_study(tmp_path, n_timesteps=128)
    assert run(longer, "--only", "collect") == 2
    assert "control 'none' has no complete run" in capsys.readouterr().err


def test_results_with_a_hub_of_ones_own(
    calls: Calls,
    tmp_path: Path,
    hub5: Path,
    no_figures: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Beside a study that is named from the current folder; its runs have absolute paths."""
    (tmp_path / "mine").mkdir()
    hub5.rename(tmp_path / "mine" / "hub5")
    overrides = {"hub.name": "hub5", "hub.top_k": 3, "hub.always_active": ["c", "a"]}
    variants = {"none": {}, "hub": {"overrides": overrides}}
    small_study(tmp_path / "mine", variants=variants)
    study = "mine/small.yaml"
    assert run(study) == 0
    file = folder_of("hub") / "config.yaml"
    config = file.read_text()
    assert f"name: {tmp_path}/mine/hub5\n" in config
    file.write_text(config.replace(f"{tmp_path}/mine", "/on/another/machine"))
    assert run(study, "--only", "collect") == 0
    file.write_text(config.replace(f"{tmp_path}/mine/hub5", "/on/another/machine/hub6"))
    assert run(study, "--only", "collect") == 2
    assert "has hub.name 'hub6', but the study says 'hub5'" in capsys.readouterr().err
    file.write_text(config.replace("/mine/hub5", "/mine"))
    assert run(study, "--only", "collect") == 2
    assert f"/mine', but the study says '{tmp_path}/mine/hub5'" in capsys.readouterr().err


def test_a_study_that_is_edited_meanwhile(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = small_study(tmp_path)
    before = file.read_text().strip()

    def edit(*_: object) -> None:
        file.write_text("nothing: true")

    monkeypatch.setattr(study, "draw", edit)
    assert run(file) == 0
    assert before in Path("docs/studies/small/report.md").read_text()


def test_a_run_that_cannot_be_started_does_not_stop_the_others(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = small_study(tmp_path, variants=variants("none", "a", "b"))
    (tmp_path / "studies/small/jobs/a/hubrl_TinyImage-v0/s0.new").mkdir(parents=True)
    assert run(file, "--only", "run", "--jobs", 1) == 1
    assert len(calls()) == 2
    error = capsys.readouterr().err
    assert f"FAILED a, {GAME}, seed 0: exit code 1, " in error
    assert "it could not be started: [Errno 21] Is a directory" in error


def test_random_encoders_need_no_fetched_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUBRL_CACHE", str(tmp_path / "empty"))
    hub = small_config(overrides={"hub.name": "packaged5", "hub.random_init": True}).hub
    assert len(engines.weights(hub)) == 12
    with pytest.raises(ValueError, match="hub 'packaged5' is not on this machine"):
        engines.weights(hub.model_copy(update={"random_init": False}))


def test_a_damaged_checkpoint_concerns_its_run_alone(
    calls: Calls,
    tmp_path: Path,
    no_figures: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = small_study(tmp_path, variants=variants("none", "a"))
    assert run(file, "--only", "run") == 0
    (folder_of("a") / "checkpoints/last/state.json").write_text("")
    assert run(file, "--only", "collect") == 0
    assert f"a, {GAME}, seed 0 is left out: " in capsys.readouterr().err
    assert f"**Not complete:** a, {GAME}" in Path("docs/studies/small/report.md").read_text()
    Path("calls").unlink()
    assert run(file, "--only", "run") == 0
    assert [arguments for arguments, *_ in calls()] == [f"--resume {folder_of('a').absolute()}"]


def test_a_run_without_its_last_evaluation_is_not_complete(calls: Calls, tmp_path: Path) -> None:
    file = small_study(tmp_path, variants=variants("none"), overrides={"train.eval_freq": 32})
    assert run(file, "--only", "run") == 0
    assert run(file, "--only", "run") == 0
    assert len(calls()) == 2
    header = "timesteps,episode,return,length\n"
    (folder_of("none") / "evaluations.csv").write_text(f"{header}64,0,1,8\n")
    assert run(file, "--only", "run") == 0
    assert len(calls()) == 2


def test_results_that_cannot_be_written(
    calls: Calls,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("file").touch()
    assert run(small_study(tmp_path), "--results", "file/results") == 2
    assert "--results file/results: " in capsys.readouterr().err
    assert run(small_study(tmp_path), "--out", "file/runs") == 2
    assert "--out file/runs: " in capsys.readouterr().err
    assert not Path("studies").exists(), "before hours of training"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(study, "draw", full)
    assert run(small_study(tmp_path)) == 1
    assert "no results: [Errno 28] No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "args", "message"),
    [
        ({"gamse": 1}, [], "unknown key gamse (closest: 'games')"),
        ({"overrides": {"hub.name": "atarii5"}}, [], "variant none: hub 'atarii5' is unknown"),
        ({"overrides": {"hub.topk": 1}}, [], "variant none: unknown key hub.topk"),
        ({"overrides": {"train.device": "gpu"}}, [], "variant none: train.device is 'gpu'"),
        ({"games": ["ALE/Breakot-v5"]}, [], "(closest: ALE/Breakout-v5"),
        ({}, ["--jobs", 0], "Invalid value for '--jobs': 0 is not in the range"),
        ({}, ["--jobs", 2, "--engine", "ray"], "--jobs and --engine ray: the cluster decides"),
        ({}, ["--engine", "slurm"], "'slurm' is not one of 'local', 'ray'"),
        ({}, ["--only", "collect"], "control 'none' has no complete run"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    changes: dict[str, Any],
    args: list[object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = small_study(tmp_path, **changes)
    before = sorted(tmp_path.rglob("*"))
    assert run(file, *args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("hubrl study: error: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_top_k_is_checked_before_hours_of_training(
    hub5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {"hub.name": str(hub5), "hub.top_k": 9}
    names = {"none": {}, "hub": {"overrides": overrides}}
    assert run(small_study(tmp_path, variants=names)) == 2
    assert "variant hub: top_k" in capsys.readouterr().err
    assert not Path("studies").exists()


@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        ("matplotlib", [], "figures need matplotlib: pip install 'hubrl[plot]'"),
        ("ray", ["--engine", "ray"], "--engine ray needs Ray: pip install ray"),
    ],
)
def test_missing_packages(
    module: str,
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert run(small_study(tmp_path), *args) == 2
    assert message in capsys.readouterr().err
    assert not Path("studies").exists()


@pytest.mark.slow
def test_a_study_from_the_command_to_its_results(hub5: Path, tmp_path: Path) -> None:
    overrides = {"hub.name": str(hub5)}
    names = {"none": {}, "hub": {"overrides": overrides}}
    file = small_study(tmp_path, variants=names)
    assert run(file) == 0
    for name, hub in (("none", ""), ("hub", "weights")):
        assert (folder_of(name) / "checkpoints/last/policy.safetensors").exists()
        facts = json.loads(
            (tmp_path / f"studies/small/jobs/{name}/hubrl_TinyImage-v0/s0.json").read_text()
        )
        assert bool(facts["weights"]) == bool(hub)
    with Path("docs/studies/small/summary.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert {row["variant"] for row in rows} == {"none", "hub"}
    assert {row["axis"] for row in rows} == {"steps", "seconds"}
    before = Path("docs/studies/small/summary.csv").read_bytes()
    assert run(file, "--only", "collect", "--results", "again") == 0
    assert Path("again/summary.csv").read_bytes() == before


def test_an_interrupted_ray_task_leaves_a_checkpoint_to_its_training(
    calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        if Path("calls.slow").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(engines.time, "sleep", interrupt)
    job = engines.Job(Run("slow", GAME, 0), tmp_path)
    job.config.parent.mkdir(parents=True)
    write_small_config(job.config)
    assert engines.run_job(job) == 143
    assert job.log.read_text() == "stopped\n"


@pytest.mark.parametrize(
    ("device", "cluster", "n_gpus"),
    [("cpu", 4.0, 0), ("auto", 4.0, 1), ("cuda", 4.0, 1), ("auto", 0.0, 0)],
)
def test_ray_is_asked_for_the_gpus_that_runs_need(
    device: str, cluster: float, n_gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hides GPUs from tasks that don't ask, and tasks that ask wait where there are none."""
    job = engines.Job(Run("slow", GAME, 0), tmp_path)
    job.config.parent.mkdir(parents=True)
    write_small_config(job.config, train__device=device)
    ray = mock.MagicMock()
    ray.cluster_resources.return_value = {"CPU": 8.0} | ({"GPU": cluster} if cluster else {})
    ray.wait.side_effect = lambda references, **_: (references, [])
    ray.get.return_value = 0
    monkeypatch.setattr(engines, "import_ray", lambda: ray)
    ended: list[tuple[engines.Job, int]] = []
    engines.run_ray([job], StopSignal(), lambda *end: ended.append(end))
    assert ended == [(job, 0)]
    task = ray.remote.return_value.return_value
    task.options.assert_called_once_with(num_gpus=n_gpus)


def test_ray_has_no_numbered_gpus() -> None:
    config = small_config(overrides={"train.device": "cuda:1"})
    with pytest.raises(ValueError, match=r"'cuda:1', allowed with --engine ray.*: auto, cpu, cuda"):
        study._check_devices([config], "ray")
    study._check_devices([config], "local")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_ray_cluster_of_two_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        assert run(small_study(tmp_path, seeds=[0, 1]), "--engine", "ray") == 0
    finally:
        cluster.shutdown()
    report = Path("docs/studies/small/report.md").read_text()
    assert "none (0 1), fast (0 1)" in report
    assert "Not complete" not in report
