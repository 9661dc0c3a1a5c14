"""Two processes of half a batch each do what one process does with the whole."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from image_files import write_classes
from safetensors.torch import load_file
from small_images import small_vision_config, write_rgb_hub

from vision_tasks.config import dump_config

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
COMMAND = (*LAUNCHER, "-m", "vision_tasks.classification")


def start(*arguments: object) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-P", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate()
    assert process.returncode == code, output
    return output


def one_step(hub: Path, folder: Path, *launcher: str) -> dict[str, torch.Tensor]:
    finish(start(*launcher, ROOT / "tests" / "one_step.py", hub, folder))
    return load_file(folder / "gradients.safetensors")


@pytest.mark.slow
def test_gradients_are_those_of_the_double_batch(tmp_path: Path) -> None:
    hub = write_rgb_hub(tmp_path / "rgb", 4)
    one = one_step(hub, tmp_path / "one")
    two = one_step(hub, tmp_path / "two", *LAUNCHER)
    scores = "model.pathway.generator.scores.weight"
    assert float(one[scores].abs().max()) > 1e-4
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert one["idle"] == two["idle"] == 0
    assert one["feature_mean.n_rows"] == two["feature_mean.n_rows"] == 4 + 4, "settled, and learned"
    assert not (tmp_path / "two" / "checkpoints" / "best").exists()
    assert (tmp_path / "two" / "results.json").exists()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of thirty epochs of ten images, which may end early, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "images", {"cat": 10, "dog": 10})
    data = {"data__name": "folder", "data__root": str(tmp_path / "images")}
    train = {"train__epochs": 30, "train__patience": 25, "train__batch_size": 4}
    hub = write_rgb_hub(tmp_path / "rgb")
    file = tmp_path / "c.yaml"
    file.write_text(dump_config(small_vision_config(hub, **data, **train)))
    return file


@pytest.mark.slow
def test_all_processes_have_one_run(config: Path) -> None:
    """Also where its folder's name has the time in it, and where the best weights are loaded."""
    finish(start(*COMMAND, "--config", config))
    assert len(list(Path("runs").glob("*/results.json"))) == len(list(Path("runs").iterdir())) == 1
    output = finish(start(*COMMAND, "--config", config, "--hub", "nowhere"), code=1)
    assert "hub 'nowhere'" in output


@pytest.mark.slow
def test_a_signal_stops_all_processes_at_one_step(config: Path) -> None:
    process = start(*COMMAND, "--config", config, "--run-dir", "r")
    while not Path("r/epochs.csv").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    process.communicate()
    assert not Path("r/results.json").exists()
    finish(start(*COMMAND, "--resume", "r"))
    with Path("r/epochs.csv").open() as lines:
        steps = [int(row["step"]) for row in csv.DictReader(lines)]
    assert steps == sorted(set(steps))
    assert Path("r/results.json").exists()
