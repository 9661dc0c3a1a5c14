"""The hub of one architecture: its cards, its members, pretexts by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_images import quadrant_data
from torch.nn import functional as F

from hubrl import cli
from hubrl.encoders import build_encoder, golden_features
from hubrl.specs import load_hub
from vision_tasks import pretrain
from vision_tasks.methods import Settings, build_method
from vision_tasks.pretexts import PRETEXTS, Rotation, random_view, with_hole
from vision_tasks.tasks import Classification


def run(*args: Any) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.run(pretrain.command, "python -m vision_tasks.pretrain", [str(arg) for arg in args])
    return int(stop.value.code or 0)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quadrants, and encoders of 32 px."""
    monkeypatch.setattr(pretrain, "load_classification", lambda *_: quadrant_data(16))
    monkeypatch.setattr(pretrain, "IMAGE_SIZE", 32)


@pytest.mark.usefixtures("tiny")
def test_five_encoders_become_a_hub(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--out", tmp_path / "same", "--epochs", 1, "--limit", 16, "--device", "cpu")
    assert run(*args) == 0
    assert capsys.readouterr().out.count("loss") == 5
    hub = load_hub(tmp_path / "same")
    assert hub.encoder_names == tuple(PRETEXTS)
    for spec in hub.encoders:
        assert spec.license == "MIT"
        assert spec.source == "python -m vision_tasks.pretrain --epochs 1 --limit 16 --seed 0"
        assert golden_features(build_encoder(hub, spec)) == pytest.approx(spec.golden, rel=1e-4)
    images = {spec.name: spec.pretraining["images"] for spec in hub.encoders}
    assert images["first-classes"] + images["other-classes"] == images["contrast"] == 16
    states = [load_file(tmp_path / "same" / f"{name}.safetensors") for name in PRETEXTS]
    weights = torch.stack([state["conv_stem.weight"] for state in states])
    assert (weights.flatten(1).unsqueeze(1) - weights.flatten(1)).abs().sum(2).count_nonzero() == 20

    assert run(*args) == 0
    assert capsys.readouterr().out.endswith("has them all\n")
    assert run("--out", "atari5", *args[2:]) == 2
    assert "out atari5 is the name of a hub that ships" in capsys.readouterr().err
    (tmp_path / "same" / "contrast.safetensors").unlink()  # as if stopped before the last
    text = (tmp_path / "same" / "hub.yaml").read_text()
    (tmp_path / "same" / "hub.yaml").write_text(text[: text.index("- name: contrast")])
    assert run(*args) == 0
    assert capsys.readouterr().out.count("loss") == 1
    again = load_file(tmp_path / "same" / "contrast.safetensors")
    assert all(torch.equal(value, again[key]) for key, value in states[-1].items())

    assert run(*args, "--seed", 1) == 2
    message = r"has an encoder 'first-classes' of `.*--seed 0`, not of `.*--seed 1`: give another"
    assert re.search(message, capsys.readouterr().err)

    images_BCHW = quadrant_data(4).train.tensors[0]
    for name in ("zoo-tuning", "model-soup"):
        method = build_method(name, hub, Classification(4), Settings(0, 32))
        method.begin("train", lambda: [quadrant_data(16).train.tensors])
        assert method(images_BCHW).isfinite().all()


def test_rotations_are_told_by_the_direction() -> None:
    """A loss of 0 where the features say which corner is bright."""
    pretext = Rotation(4, 10)
    pretext.head = torch.nn.Identity()
    image_CHW = torch.zeros(3, 4, 4)
    image_CHW[:, 0, 0] = 1.0  # top left, then by quarters to the left: bottom left ...

    def corners(images_BCHW: torch.Tensor) -> torch.Tensor:
        seen_BHW = images_BCHW[:, 0]
        places = [seen_BHW[:, y, x] for y, x in ((0, 0), (3, 0), (3, 3), (0, 3))]
        return 50 * torch.stack(places, dim=1)

    loss = pretext.loss(corners, image_CHW.expand(8, -1, -1, -1), torch.zeros(8).long())
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["first-classes", "other-classes"])
def test_halves_of_the_classes(name: str) -> None:
    pretext = PRETEXTS[name](4, 5)
    rows = pretext.rows(torch.arange(5))
    first = [True, True, False, False, False]
    assert rows.tolist() == (first if name == "first-classes" else [not is_in for is_in in first])
    targets = torch.arange(5)[rows]
    logits = 50 * F.one_hot(targets - targets[0], int(rows.sum())).float()
    pretext.head = torch.nn.Identity()
    assert pretext.loss(lambda _: logits, torch.zeros(1), targets).item() < 1e-6


def test_holes_have_a_quarter_of_the_image() -> None:
    torch.manual_seed(0)
    images_BCHW = torch.rand(20, 3, 8, 8)
    holed_BCHW = with_hole(images_BCHW)
    changed_BHW = (holed_BCHW != images_BCHW).any(dim=1)
    assert changed_BHW.sum(dim=(1, 2)).tolist() == [16] * 20
    assert len({tuple(each.flatten().tolist()) for each in changed_BHW}) > 5


def test_views_are_parts_of_the_image() -> None:
    torch.manual_seed(0)
    ramp_BCHW = torch.linspace(0.1, 0.5, 16).expand(30, 3, 16, 16)
    views_BCHW = random_view(ramp_BCHW)
    assert torch.allclose(views_BCHW[:, :, :1], views_BCHW, atol=1e-5)  # rows stay alike
    widths = views_BCHW[:, 0, 0].amax(1) / views_BCHW[:, 0, 0].amin(1)
    assert widths.min() > 1.2
    is_mirrored = views_BCHW[:, 0, 0, 0] > views_BCHW[:, 0, 0, -1]
    assert 5 < is_mirrored.sum() < 25
