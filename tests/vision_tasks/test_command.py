"""The commands of the image tasks: files, resume, and what users get wrong."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import weakref
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import yaml
from image_files import write_classes
from small_images import (
    SIZE,
    landmark_data,
    quadrant_data,
    small_vision_config,
    write_rgb_hub,
)
from torch import Tensor

from hubrl import cli
from hubrl.run_folder import held, read_rows
from vision_tasks import classification, command, landmarks, runs
from vision_tasks.config import BUILT_IN_CONFIGS, dump_config, load_config
from vision_tasks.tasks import Classification
from vision_tasks.training import Trainer

NAME = "python -m vision_tasks.classification"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runs, "load_classification", lambda *_: quadrant_data())
    monkeypatch.chdir(tmp_path)
    return write_rgb_hub(tmp_path / "rgb")


def run(*args: Any, task: Any = classification) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.run(task.command, NAME, [str(arg) for arg in args])
    return int(stop.value.code or 0)


def small(hub: Path, *args: Any) -> tuple[Any, ...]:
    sizes = ("--image-size", SIZE, "--epochs", 1, "--batch-size", 8, "--device", "cpu")
    return ("--data", "fashion-mnist", "--hub", hub, *sizes, *args)


@pytest.mark.parametrize("method", ["hub-pathway", "ensemble-j", "ensemble-i", "single:b"])
def test_a_run_leaves_its_files(
    method: str, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(*small(hub, "--method", method, "--run-dir", folder)) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["method"] == method
    assert 0 <= results["test"][""]["accuracy"] <= 1
    names = {file.name.split(".")[0] for file in folder.iterdir() if file.name != ".lock"}
    assert names == {"checkpoints", "command", "config", "data", "epochs", "events", "results"}
    config = load_config(folder / "config.yaml")
    assert (config.method, config.train.epochs) == (method, 1)
    assert "accuracy" in capsys.readouterr().out
    assert run("--resume", folder) == 0
    assert "is complete" in capsys.readouterr().out
    assert run("--config", folder / "config.yaml", "--run-dir", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["test"] == results["test"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--method", "hub-pathwy"), r"method is 'hub-pathwy' \(closest: 'hub-pathway'\), allowed"),
        (("--method", "single"), r"hub 'rgb' has 3 encoders: choose one, as single:a"),
        (("--method", "single:z"), r"hub 'rgb' has no encoder 'z'.*it has: a, b, c"),
        (("--method", "ensemble-j:a"), r"method is 'ensemble-j:a'.*, allowed: single:ENCODER"),
        (("--top-k", "9"), r"top_k is 9, allowed: 1..3"),
        (("--epochs", "0"), r"train.epochs is '0', allowed: a whole number at least 1"),
        (
            ("--method", "ensemble-j", "--set", "hub.top_k=1"),
            r"--set hub.top_k has no meaning with method 'ensemble-j': leave it out",
        ),
        (("--set", "train.warmup=2"), r"train.warmup is 2, allowed: a number at least 0 and at mo"),
        (
            ("--set", "method.x=2"),
            r"--set has the key 'method.x', allowed: SECTION.KEY with a",
        ),
        (("--device", "cuda:7"), r"train.device is 'cuda:7', allowed on this machine: auto, cpu"),
        (("--generator", "big"), r"generator is 'big'"),
        (
            ("--method", "ensemble-j", "--top-k", "1"),
            r"--top-k has no meaning with method 'ensemble-j': leave it out; it is for hub-pathway",
        ),
    ],
)
def test_what_users_get_wrong(
    args: tuple[str, ...],
    message: str,
    hub: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*small(hub, "--run-dir", tmp_path / "run", *args)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert re.search(message, error), error


def test_the_configuration_of_a_run_is_found_from_anywhere(hub: Path, tmp_path: Path) -> None:
    """And names the number format, which this machine chose by a measurement."""
    (tmp_path / "data").mkdir()
    given = ("--method", "single:b", "--run-dir", "r", "--hub", "rgb", "--root", "data")
    assert run(*small(hub, *given)) == 0
    config = load_config(tmp_path / "r" / "config.yaml")
    assert config.hub.name == str(tmp_path / "rgb")
    assert config.data.root == str(tmp_path / "data")
    assert config.hub.precision in ("float32", "bfloat16")
    assert config.hub.top_k == 2


@pytest.mark.parametrize(("n", "batch_size"), [(3, 8), (2, 32)])
def test_processes_without_equal_shares(
    n: int,
    batch_size: int,
    hub: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command.distributed, "n_processes", lambda: n)
    monkeypatch.setattr(command.distributed, "from_leader", lambda make: make())
    assert run(*small(hub, "--batch-size", batch_size)) == 2
    message = (
        f"train.batch_size is {batch_size}, but torchrun started {n} processes, which share 24"
    )
    assert message in capsys.readouterr().err


def test_more_processes_than_gpus(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert run(*small(hub)) == 2
    message = "torchrun started 2 processes, but there are 1 GPUs: give --nproc-per-node 1, or CUDA"
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_full(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(command, "build", full)
        assert run(*small(hub, "--method", "single:b", "--run-dir", "r")) == 1
    assert "the GPU's memory is full: lower train.batch_size" in capsys.readouterr().err
    monkeypatch.setattr(Classification, "losses", full)
    assert run(*small(hub, "--method", "single:b", "--run-dir", "r")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the GPU's memory is full: lower train.batch_size, hub.top_k or" in error


def test_landmarks_to_the_end(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "load_landmarks", lambda *_: landmark_data())
    sizes = ("--image-size", SIZE, "--epochs", 2, "--batch-size", 8, "--device", "cpu")
    assert run("--hub", hub, *sizes, "--run-dir", "r", task=landmarks) == 0
    results = json.loads(Path("r/results.json").read_text())
    assert set(results["test"][""]) == {"nme", "failure_rate", "auc", "loss"}
    rows = read_rows(Path("r/epochs.csv"))
    assert float(rows[1]["validation/nme"]) < float(rows[0]["validation/nme"])


def test_models_of_timm_are_a_hub(hub: Path) -> None:
    names = "timm:mobilenetv3_small_050,resnet10t"
    assert run(*small(hub, "--hub", names, "--random-init", "--run-dir", "r")) == 0
    assert load_config(Path("r/config.yaml")).hub.name == names
    assert json.loads(Path("r/results.json").read_text())["hub"] == names


def test_the_papers_hub_without_a_network(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line says which files to put where."""

    def no_network(*_: object, **__: object) -> None:
        raise URLError("no network")

    for place in ("HUBRL_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(place, str(hub / "cache"))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    assert run(*small(hub, "--hub", "resnet50x5", "--run-dir", "r")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{hub}/cache/files/moco_v2_800ep_pretrain.pth.tar is missing; put it there" in error
    assert f"resnet50-0676ba61.pth into {hub}/cache/hub/checkpoints" in error
    assert not Path("r").exists()


def test_a_run_folder_is_not_used_twice(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*small(hub, "--run-dir", hub)) == 2
    assert "exists; give another, or continue it by --resume" in capsys.readouterr().err
    assert run("--resume", hub) == 2
    assert "is not the folder of a run: it has no config.yaml" in capsys.readouterr().err
    assert run("--resume", hub, "--seed", 3) == 2
    assert "--seed and --resume: a resumed run keeps its config.yaml" in capsys.readouterr().err


def test_a_configuration_of_the_other_task(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--config", BUILT_IN_CONFIGS / "landmarks.yaml", "--hub", hub) == 2
    assert "is of landmarks, not of classification" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"flip": True}, {"shift": 2}])
def test_landmarks_do_not_move(
    change: dict[str, Any], hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = yaml.safe_load((BUILT_IN_CONFIGS / "landmarks.yaml").read_text())
    data["data"] |= change
    (tmp_path / "moved.yaml").write_text(yaml.safe_dump(data))
    assert run("--config", tmp_path / "moved.yaml", "--hub", hub, task=landmarks) == 2
    assert "data.flip and data.shift would leave the landmarks" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an image each one after it would come into another part of the split."""
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "images", {"cat": 12, "dog": 12})
    hub = write_rgb_hub(tmp_path / "rgb")
    command = ("--data", "folder", "--root", "images", *small(hub, "--method", "single:a")[2:])
    first = sorted((tmp_path / "images" / "cat").iterdir())[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:60])
    assert run(*command, "--run-dir", "r") == 1
    assert "replace it, or remove it and train anew" in capsys.readouterr().err
    first.unlink()
    assert run("--resume", "r") == 2
    message = "r began with other images: its train part is another one (12 images then, 12 now)"
    assert message in capsys.readouterr().err
    first.write_bytes(whole)
    assert run("--resume", "r") == 0
    (tmp_path / "killed").mkdir()  # before it noted its images
    shutil.copy(tmp_path / "r" / "config.yaml", tmp_path / "killed")
    assert run("--resume", "killed") == 0
    assert '"n_images": 12' in (tmp_path / "killed" / "data.json").read_text()


def test_the_same_command_again(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = small(hub, "--method", "uniform", "--run-dir", "runs/r")
    assert run(*command) == 0
    Path("runs/r/results.json").unlink()
    assert run(*command) == 2
    captured = capsys.readouterr()
    assert "runs/r is an unfinished run like this; --resume auto would" in captured.out
    assert "exists; give another, or continue it by --resume" in captured.err
    assert run(*command[:-2], "--resume", "auto") == 0
    assert Path("runs/r/results.json").exists()
    assert run(*command, "--resume", "auto") == 0
    assert "runs/r is complete" in capsys.readouterr().out
    Path("runs/r/results.json").unlink()
    with held(Path("runs/r")):
        assert run(*command, "--resume", "auto") == 2
    assert "runs/r is in use by another process" in capsys.readouterr().err


def test_a_table_that_cant_be_written(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("csv.DictWriter.writerow", full)
        assert run(*small(hub, "--method", "single:b", "--run-dir", folder)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left on device" in error
    assert run("--resume", folder) == 0


def test_a_run_of_a_hub_in_a_folder_is_named_after_the_hub(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*small(hub, "--method", "single:b")) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("fashion-mnist-single_b-rgb-s0-")


def test_a_loss_that_is_no_number_ends_in_one_line_or_rolls_back(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[None] = []
    losses = Classification.losses

    def broken_once(self: Classification, outputs_BO: Tensor, targets_B: Tensor) -> Tensor:
        calls.append(None)
        return losses(self, outputs_BO, targets_B) * (math.nan if len(calls) == 6 else 1.0)

    monkeypatch.setattr(Classification, "losses", broken_once)
    config = tmp_path / "c.yaml"
    stopping = small_vision_config(hub, "single:b", data__name="fashion-mnist")
    config.write_text(dump_config(stopping))
    assert run("--config", config, "--run-dir", "stopped") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "stopped, step 4: the loss (task) is NaN; what was saved before is whole: " in error
    assert "train anew with a lower train.learning_rate, or raise train.n_rollbacks" in error
    calls.clear()
    train = stopping.train.model_copy(update={"n_rollbacks": 1})
    config.write_text(dump_config(stopping.model_copy(update={"train": train})))
    assert run("--config", config, "--run-dir", "back") == 0
    said = "back, step 4: the loss (task) is NaN: back to step 3 at half the learning rate"
    assert said in capsys.readouterr().out
    state = json.loads(Path("back/checkpoints/last/state.json").read_text())
    assert state["n_rollbacks"] == 1
    assert [row["step"] for row in read_rows(Path("back/epochs.csv"))] == ["3", "6"]


@pytest.mark.parametrize(("method", "swap"), [("single:b", None), ("hub-pathway", 2)])
def test_a_rollback_frees_the_model_before_another_is_built(
    method: str, swap: int | None, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the failed step had computed; with --swap it fails inside of backward."""
    former: list[weakref.ref[Any]] = []
    left: list[list[Any]] = []
    build, init = command._build, Trainer.__init__

    def watched_build(*args: Any) -> Any:
        left.append([type(ref()) for ref in former if ref() is not None])
        built = build(*args)
        former.append(weakref.ref(built.method))
        return built

    def watched_init(self: Trainer, *args: Any) -> None:
        init(self, *args)
        former.append(weakref.ref(self))

    monkeypatch.setattr(command, "_build", watched_build)
    monkeypatch.setattr(Trainer, "__init__", watched_init)
    place = "swap" if swap else "training"
    answers = itertools.chain([True, False], itertools.repeat(True))
    monkeypatch.setattr(f"vision_tasks.{place}.are_finite", lambda _: next(answers))
    config = small_vision_config(
        hub, method, data__name="fashion-mnist", train__n_rollbacks=1, hub__swap=swap
    )
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert run("--config", tmp_path / "c.yaml", "--run-dir", "back") == 0
    assert left == [[], []]
    assert len(former) == 4
