"""Costs of a hub: the supplement's counts to the printed digit, and the command's tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_hubs import library_spec
from small_images import SIZE, write_rgb_hub
from torch import nn

from hubrl import cli
from hubrl.encoders import with_features_dim
from hubrl.specs import HubSpec, load_hub, save_hub
from vision_tasks import complexity
from vision_tasks.costed import Setup, costed_hub
from vision_tasks.counting import count_costs, count_flops
from vision_tasks.memory import find_peak
from vision_tasks.timing import measure_speed


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.run(complexity.command, "python -m vision_tasks.complexity", [str(a) for a in args])
    return int(stop.value.code or 0)


def test_the_papers_hub_costs_what_the_paper_prints() -> None:
    setup = Setup("resnet50x5")
    costs = count_costs(costed_hub(setup), setup)
    printed = {
        name: (round(cost.parameters / 1e6, 2), round(cost.flops / 1e9, 2))
        for name, cost in costs.items()
    }
    assert printed == {
        "single": (23.71, 4.11),
        "ensemble-j": (118.56, 20.55),
        "hub-pathway": (128.43, 9.11),
    }


def test_operations_by_hand() -> None:
    """A convolution of 4 outputs of 3x3x3 each at 6x6 places, BatchNorm, a linear layer."""
    with torch.device("meta"):
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
        ).eval()
        images = torch.zeros(1, 3, 8, 8)
    expected = 4 * 36 * 27 + 2 * 4 * 36 + 144 * 10
    assert count_flops(lambda: network(images)) == expected


def test_all_figures_of_a_small_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = write_rgb_hub(tmp_path / "rgb")
    file = tmp_path / "costs.json"
    sizes = ("--image-size", SIZE, "--n-outputs", 4, "--batch-size", 3, "--generator", "small")
    monkeypatch.setattr(complexity, "measure_memory", lambda *_: {})
    assert run("--hub", hub, *sizes, "--json", file) == 0
    figures = json.loads(file.read_text())
    assert figures["setup"]["image_size"] == SIZE
    assert set(figures["speed"]["inference"]) == set(figures["speed"]["training"])
    assert {ratio["name"] for ratio in figures["ratios"]} >= {
        "samples per second, inference: pathway / ensemble-j"
    }
    for ratio in figures["ratios"]:
        assert ratio["ratio"] == pytest.approx(ratio["ours"] / ratio["theirs"])
    output = capsys.readouterr().out
    assert "Inference of one image, ms" in output
    assert "All costs, batch 3" in output
    assert "hub-pathway" in output


def test_a_setup_that_the_doubled_hub_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = write_rgb_hub(tmp_path / "rgb")
    sizes = ("--image-size", SIZE, "--top-k", 3, "--generator", "uniform", "--only", "counts")
    assert run("--hub", hub, *sizes) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


def test_a_model_that_cant_be_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = with_features_dim(library_spec("torchvision:regnet_y_400mf", 3, 64))
    save_hub(HubSpec(name="regnet", encoders=(spec,)), tmp_path)
    assert run("--hub", tmp_path, "--image-size", 64, "--top-k", 1) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    message = (
        "(torchvision:regnet_y_400mf) has a model that knows no meta device, on which models are "
        "counted, such as a RegNet of torchvision: take another"
    )
    assert message in error


def test_what_was_measured_before_a_lack_of_memory_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("ensemble-j, training: exits -9: ")

    monkeypatch.setattr(complexity, "measure_memory", fail)
    sizes = ("--image-size", SIZE, "--n-outputs", 4, "--batch-size", 3, "--generator", "small")
    file = tmp_path / "costs.json"
    assert run("--hub", write_rgb_hub(tmp_path / "rgb"), *sizes, "--json", file) == 1
    assert "error: ensemble-j, training: exits -9:" in capsys.readouterr().err
    figures = json.loads(file.read_text())
    assert figures["counts"]["single"]["parameters"] > 0
    assert figures["speed"]["training"]["hub-pathway"] > 0


def test_costs_of_a_hub_with_an_encoder_that_is_always_active(tmp_path: Path) -> None:
    specs = load_hub(write_rgb_hub(tmp_path / "rgb")).encoders
    save_hub(HubSpec(name="rgb", encoders=specs, always_active=("a",)), tmp_path / "rgb")
    setup = Setup(str(tmp_path / "rgb"), 4, SIZE, 3, generator="small")
    speed = measure_speed(costed_hub(setup), setup, rounds=1)
    assert speed.training["hub-pathway"] > 0
    assert find_peak(setup, "training", "hub-pathway", "generator").above >= 0


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    hub = write_rgb_hub(tmp_path / "rgb")
    file = tmp_path / "costs.json"
    sizes = ("--image-size", SIZE, "--n-outputs", 4, "--batch-size", 64, "--generator", "small")
    assert run("--hub", hub, *sizes, "--json", file) == 0
    memory = json.loads(file.read_text())["memory"]["training"]
    assert memory["ensemble-j"]["models"] > memory["single"]["models"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--hub", "resnet50x6"), "hub 'resnet50x6' is unknown (closest: 'resnet50x5')"),
        (("--hub", "resnet50x5", "--top-k", 9), "top_k is 9, allowed: 1..5"),
        (("--hub", "resnet50x5", "--generator", "big"), "generator is 'big'"),
        (("--hub", "resnet50x5", "--image-size", 8), "image size is 8 px, allowed: 32"),
    ],
)
def test_what_users_get_wrong(
    args: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*args, "--only", "counts") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--json", "no/x.json"), "--json no/x.json: there is no folder"),
        (("--json", "."), "--json . is a folder: give a file"),
        (("--device", "cuda:7"), "--device is 'cuda:7', allowed on this machine: auto, cpu"),
    ],
)
def test_what_is_refused_before_anything_is_measured(
    args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--hub", "resnet50x5", *args) == 2
    assert message in capsys.readouterr().err
