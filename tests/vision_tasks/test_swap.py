"""Swapped encoders: the numbers of encoders in memory, at most N of them there, exact resume."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from small_hubs import library_spec, nature_spec, write_hub
from torch import Tensor
from torch.utils.data import TensorDataset

from hubrl import state_folder
from hubrl.encoders import build_encoder
from hubrl.files import DamagedFileError, file_sha256
from hubrl.finite import NotFiniteError
from hubrl.sections import Schedule
from hubrl.signals import StopSignal
from hubrl.specs import HubSpec, load_hub
from vision_tasks import classification, distributed, runs
from vision_tasks.config import BUILT_IN_CONFIGS, VisionConfig, load_config
from vision_tasks.data import ImageData
from vision_tasks.methods import Settings, build_method
from vision_tasks.methods.hub_pathway import HubPathwayMethod
from vision_tasks.swap import Swap, SwappedEncoder, SwappedEncoders, swapped_encoders
from vision_tasks.tasks import Classification
from vision_tasks.training import Trainer

SIZE = 36
NAMES = "abcde"


@pytest.fixture
def hub(tmp_path: Path) -> HubSpec:
    """Five small encoders of RGB images."""
    specs = [dataclasses.replace(nature_spec(name), channels=3) for name in NAMES]
    return load_hub(write_hub(tmp_path / "rgb5", specs))


def images_of(n: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    images_BCHW = torch.randint(0, 256, (n, 3, SIZE, SIZE), generator=generator)
    classes_B = torch.randint(0, 4, (n,), generator=generator)
    return TensorDataset(images_BCHW.to(torch.uint8), classes_B)


def config_of(**values: Any) -> VisionConfig:
    """Two epochs of three steps; keys as ``train__epochs``."""
    overrides = {
        "data.image_size": SIZE,
        "train.epochs": 2,
        "train.batch_size": 8,
        "train.encoder_lr_scale": 0.5,
        "train.device": "cpu",
        **{key.replace("__", "."): value for key, value in values.items()},
    }
    return load_config(BUILT_IN_CONFIGS / "classification.yaml", overrides)


def method_of(hub: HubSpec, swap: Swap | None, **settings: Any) -> HubPathwayMethod:
    torch.manual_seed(0)
    given = Settings(seed=0, image_size=SIZE, swap=swap)._replace(**settings)
    method = build_method("hub-pathway", hub, Classification(4), given)
    assert isinstance(method, HubPathwayMethod)
    return method


class Killed(Exception):
    """In the place of a signal that no process survives."""


def train(
    method: HubPathwayMethod,
    folder: Path,
    stop_after: int = 0,
    killed_after: int = 0,
    **values: Any,
) -> int | None:
    """Train on 24 images, and stop after some steps, as a signal does."""
    data = ImageData(images_of(24, 0), images_of(12, 1), images_of(12, 2), 4, tuple("wxyz"))
    stop = StopSignal()
    loss, n_steps = method.loss, 0

    def count(*arguments: Any) -> Any:
        nonlocal n_steps
        n_steps += 1
        stop.number = 15 if n_steps == stop_after else stop.number
        if n_steps - 1 == killed_after > 0:
            raise Killed
        return loss(*arguments)

    method.loss = count  # type: ignore[method-assign]
    return Trainer(method, data, config_of(**values), folder).run(stop)


def encoders_of(method: HubPathwayMethod) -> SwappedEncoders:
    encoders = swapped_encoders(method)
    assert encoders is not None
    return encoders


def in_memory(encoders: SwappedEncoders) -> list[str]:
    """Names of the encoders whose weights hold numbers."""
    held = (any(weight.numel() > 0 for weight in encoders[i].weights) for i in range(len(NAMES)))
    return [name for name, is_held in zip(NAMES, held, strict=True) if is_held]


def weights_of(method: HubPathwayMethod, folder: Path) -> dict[str, Tensor]:
    """All weights by their name in a method that has its encoders in memory."""
    weights = dict(method.state_dict())
    if swapped_encoders(method) is not None:
        encoders_of(method).files()
        for name in NAMES:
            saved = load_file(folder / f"encoder.{name}.safetensors")
            prefix = f"model.pathway.encoders.owned.{name}.trunk."
            weights |= {prefix + key: value for key, value in saved.items()}
    return {key: value for key, value in weights.items() if isinstance(value, Tensor)}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=0, atol=tolerance, msg=key)


# More than k, fewer than k, and all.
@pytest.mark.parametrize("n_resident", [1, 2, 5, 9])
def test_training_gives_the_numbers_of_encoders_in_memory(
    hub: HubSpec, tmp_path: Path, n_resident: int
) -> None:
    swap = Swap(n_resident, tmp_path / "ours" / "swap")
    ours, theirs = method_of(hub, swap), method_of(hub, None)
    assert_equal(weights_of(ours, swap.folder), weights_of(theirs, swap.folder), 0.0)
    for method, folder in ((ours, "ours"), (theirs, "theirs")):
        train(method, tmp_path / folder)
    assert_equal(weights_of(ours, swap.folder), weights_of(theirs, swap.folder), 1e-6)
    results = [
        json.loads((tmp_path / folder / "results.json").read_text())
        for folder in ("ours", "theirs")
    ]
    for name in ("validation", "test"):
        assert results[0][name][""] == pytest.approx(results[1][name][""], abs=1e-6)
    assert len(in_memory(encoders_of(ours))) == min(n_resident, 5)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bfloat16"},
        {"pretrained": False},
        {"top_k": 1, "exploration_coef": Schedule.constant(0.0)},
        {"top_k": 5, "generator": "uniform"},
    ],
    ids=["bfloat16", "random", "top1", "uniform"],
)
def test_numbers_are_equal_in_other_settings(
    hub: HubSpec, tmp_path: Path, settings: dict[str, Any]
) -> None:
    swap = Swap(2, tmp_path / "ours" / "swap")
    ours, theirs = method_of(hub, swap, **settings), method_of(hub, None, **settings)
    for method, folder in ((ours, "ours"), (theirs, "theirs")):
        train(method, tmp_path / folder, train__epochs=1)
    assert_equal(weights_of(ours, swap.folder), weights_of(theirs, swap.folder), 1e-6)
    images_BCHW = images_of(6, 3).tensors[0]
    with torch.no_grad():
        torch.testing.assert_close(ours(images_BCHW), theirs(images_BCHW), rtol=0, atol=1e-6)


def test_no_more_than_n_encoders_are_in_memory(hub: HubSpec, tmp_path: Path) -> None:
    method = method_of(hub, Swap(2, tmp_path / "run" / "swap"))
    encoders = encoders_of(method)
    assert in_memory(encoders) == []
    images_BCHW = images_of(3, 0).tensors[0]
    for i in (0, 1, 0, 2):
        encoders[i](images_BCHW)
    assert in_memory(encoders) == ["a", "c"]  # b was used least recently
    train(method, tmp_path / "run", train__epochs=1)
    assert len(in_memory(encoders)) == 2
    assert not any("encoders" in name for name, _ in method.named_parameters())


def test_an_encoder_that_no_image_activates_stays_as_it_is(hub: HubSpec, tmp_path: Path) -> None:
    """Not even weight decay moves it, nor does it count a step."""
    swap = Swap(2, tmp_path / "run" / "swap")
    method = method_of(hub, swap, exploration_coef=Schedule.constant(0.0))
    with torch.no_grad():
        method.model.pathway.generator.scores.bias.copy_(torch.tensor([50.0, 50.0, 0, 0, 0]))
    before = weights_of(method, swap.folder)
    train(method, tmp_path / "run", train__weight_decay=0.5)
    after = weights_of(method, swap.folder)
    for name in NAMES:
        key = f"model.pathway.encoders.owned.{name}.trunk.cnn.0.weight"
        assert torch.equal(before[key], after[key]) == (name not in "ab")
    steps = {
        name: load_file(swap.folder / f"encoder.{name}.optimizer.safetensors")["0.step"]
        for name in "ab"
    }
    assert steps == {"a": 6, "b": 6}
    assert not (swap.folder / "encoder.c.optimizer.safetensors").exists()


def test_encoders_without_a_learning_rate_are_not_written_again(
    hub: HubSpec, tmp_path: Path
) -> None:
    swap = Swap(1, tmp_path / "run" / "swap")
    method = method_of(hub, swap)
    before = {file: file.stat().st_ino for file in swap.folder.iterdir()}
    train(method, tmp_path / "run", train__encoder_lr_scale=0.0)
    assert {file: file.stat().st_ino for file in swap.folder.iterdir()} == before


@pytest.mark.parametrize("stop_after", [2, 5])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    hub: HubSpec, tmp_path: Path, stop_after: int
) -> None:
    swap = Swap(2, tmp_path / "run" / "swap")
    assert train(method_of(hub, swap), tmp_path / "run", stop_after) == 15
    resumed = method_of(hub, swap)  # as a new process: the swap folder is made anew
    assert train(resumed, tmp_path / "run") is None
    whole = Swap(2, tmp_path / "whole" / "swap")
    method = method_of(hub, whole)
    train(method, tmp_path / "whole")
    assert_equal(weights_of(resumed, swap.folder), weights_of(method, whole.folder), 0.0)
    for name in NAMES:
        file = f"encoder.{name}.optimizer.safetensors"
        assert_equal(load_file(swap.folder / file), load_file(whole.folder / file), 0.0)


def test_a_killed_run_goes_on_at_its_last_checkpoint(hub: HubSpec, tmp_path: Path) -> None:
    """The swap folder was two steps further."""
    swap = Swap(1, tmp_path / "run" / "swap")
    with pytest.raises(Killed):
        train(method_of(hub, swap), tmp_path / "run", killed_after=5)
    resumed = method_of(hub, swap)
    train(resumed, tmp_path / "run")
    whole = Swap(1, tmp_path / "whole" / "swap")
    method = method_of(hub, whole)
    train(method, tmp_path / "whole")
    assert_equal(weights_of(resumed, swap.folder), weights_of(method, whole.folder), 0.0)


def test_a_checkpoint_is_not_changed_by_later_steps(hub: HubSpec, tmp_path: Path) -> None:
    """As after a kill: what was trained since the last checkpoint is lost, and nothing else."""
    swap = Swap(1, tmp_path / "run" / "swap")
    method = method_of(hub, swap)
    train(method, tmp_path / "run", stop_after=2)
    last = tmp_path / "run" / "checkpoints" / "last"
    before = {file.name: file.read_bytes() for file in last.iterdir()}
    assert {f"encoder.{name}.safetensors" for name in NAMES} < before.keys()
    encoders = encoders_of(method)
    for i in range(5):  # steps that no checkpoint follows
        encoders[i](images_of(4, 0).tensors[0]).sum().backward()
    encoders.files()
    assert {file.name: file.read_bytes() for file in last.iterdir()} == before
    encoders.restore(last)
    for name in NAMES:
        file = f"encoder.{name}.safetensors"
        assert (swap.folder / file).read_bytes() == before[file]


def test_the_best_weights_come_back(hub: HubSpec, tmp_path: Path) -> None:
    """With ``patience`` the weights of the best epoch count, encoders included."""
    swap = Swap(2, tmp_path / "run" / "swap")
    method = method_of(hub, swap)
    train(method, tmp_path / "run", train__patience=5, train__epochs=3)
    weights = weights_of(method, swap.folder)
    for name in NAMES:
        best = load_file(tmp_path / "run" / "checkpoints" / "best" / f"encoder.{name}.safetensors")
        key = f"model.pathway.encoders.owned.{name}.trunk.cnn.0.weight"
        assert torch.equal(best["cnn.0.weight"], weights[key])


def test_no_encoder_learns_from_a_loss_that_is_not_finite(hub: HubSpec, tmp_path: Path) -> None:
    swap = Swap(2, tmp_path / "run" / "swap")
    method = method_of(hub, swap)
    before = weights_of(method, swap.folder)
    with torch.no_grad():
        method.model.heads["b"].bias.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match=r"the loss \(task\) is NaN"):
        train(method, tmp_path / "run")
    after = weights_of(method, swap.folder)
    for key in before.keys() - {"model.heads.b.bias"}:
        if "encoders" in key:
            assert torch.equal(before[key], after[key]), key


def test_no_encoder_learns_from_a_gradient_that_is_not_finite(
    hub: HubSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap = Swap(2, tmp_path / "run" / "swap")
    method = method_of(hub, swap)
    before = weights_of(method, swap.folder)
    step = SwappedEncoder.step

    def loud(self: SwappedEncoder, *args: object) -> None:
        *images, gradients_BD = args
        step(self, *images, gradients_BD * torch.inf)  # type: ignore[arg-type, operator]

    monkeypatch.setattr(SwappedEncoder, "step", loud)
    message = r"run, step 0: a gradient of encoder \w is NaN or infinite"
    with pytest.raises(NotFiniteError, match=message):
        train(method, tmp_path / "run")
    after = weights_of(method, swap.folder)
    assert all(torch.equal(before[key], after[key]) for key in before if "encoders" in key)


def test_no_checkpoint_of_a_weight_that_is_not_finite(hub: HubSpec, tmp_path: Path) -> None:
    swap = Swap(2, tmp_path / "swap")
    method = method_of(hub, swap)
    encoders = swapped_encoders(method)
    assert encoders is not None
    encoder = encoders[0]
    assert isinstance(encoder, SwappedEncoder)
    encoder.run(torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), torch.float32)
    next(encoder.trunk.parameters()).data[0] = torch.nan
    encoder._is_changed = True
    with pytest.raises(NotFiniteError, match=r"weight cnn\.0\.weight of encoder a holds NaN"):
        encoders.files()


def test_files_of_another_encoder(hub: HubSpec, tmp_path: Path) -> None:
    """A stranger's, whose manifest fits."""
    swap = Swap(1, tmp_path / "run" / "swap")
    method = method_of(hub, swap)
    train(method, tmp_path / "run", train__epochs=1)
    images_BCHW = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    for end, message in [("", r"is not of encoder a"), (".optimizer", r"has another shape than")]:
        encoders = swapped_encoders(method)
        assert encoders is not None
        encoder = encoders[0]
        assert isinstance(encoder, SwappedEncoder)
        encoders[1].run(images_BCHW, torch.float32)  # type: ignore[attr-defined]
        file = swap.folder / f"encoder.a{end}.safetensors"
        whole = file.read_bytes()
        save_file({key: value[..., None] for key, value in load_file(file).items()}, file)
        with pytest.raises(DamagedFileError, match=message):
            encoder(images_BCHW).sum().backward()
        file.write_bytes(whole)


def test_buffers_are_swapped_too(mixed_hub: Path, tmp_path: Path) -> None:
    """Statistics of normalisation are no parameters."""
    hub = load_hub(mixed_hub).only("rgb")
    encoders = SwappedEncoders(hub, (), False, swap=Swap(1, tmp_path / "run" / "swap"))
    encoder = encoders[0]
    buffers = dict(encoder.trunk.named_buffers())
    assert {name for name, value in buffers.items() if value.numel() > 0} == {
        "norm.num_batches_tracked"  # a scalar
    }
    encoder(torch.zeros(1, 3, 48, 48, dtype=torch.uint8))
    assert torch.equal(buffers["norm.running_var"], torch.ones(8))


def test_a_disk_without_links_gets_copies(
    hub: HubSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("weights")
    state_folder.link_file(source, target)
    assert target.read_text() == "weights"
    assert target.stat().st_ino != source.stat().st_ino


def test_a_checkpoint_without_an_encoder_is_refused(hub: HubSpec, tmp_path: Path) -> None:
    encoders = encoders_of(method_of(hub, Swap(2, tmp_path / "run" / "swap")))
    with pytest.raises(ValueError, match=r"has no file encoder\.a\.safetensors"):
        encoders.restore(tmp_path)


def test_a_hub_without_its_files_leaves_nothing(hub: HubSpec, tmp_path: Path) -> None:
    assert hub.folder is not None
    (hub.folder / "d.safetensors").unlink()
    with pytest.raises(ValueError, match=r"d\.safetensors is missing"):
        method_of(hub, Swap(2, tmp_path / "run" / "swap"))
    assert not (tmp_path / "run").exists()


def test_a_weight_file_that_is_not_finite_leaves_nothing(hub: HubSpec, tmp_path: Path) -> None:
    """It is noticed as it is swapped out, before a step."""
    assert hub.folder is not None
    file = hub.folder / "d.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file)
    specs = [
        dataclasses.replace(spec, sha256=file_sha256(file)) if spec.name == "d" else spec
        for spec in hub.encoders
    ]
    damaged = dataclasses.replace(hub, encoders=tuple(specs))
    with pytest.raises(ValueError, match=r"weight .* of encoder d holds NaN"):
        method_of(damaged, Swap(2, tmp_path / "run" / "swap"))
    assert not (tmp_path / "run").exists()


def run(hub: HubSpec, *arguments: str) -> Result:
    small = ["--hub", str(hub.folder), "--image-size", str(SIZE), "--device", "cpu"]
    return CliRunner().invoke(classification.command, [*small, *arguments])


@pytest.fixture
def noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's images."""
    data = ImageData(images_of(24, 0), images_of(12, 1), images_of(12, 2), 4, tuple("wxyz"))
    monkeypatch.setattr(runs, "load_classification", lambda *_: data)


def test_the_command_swaps_and_cleans_up(hub: HubSpec, tmp_path: Path, noise: None) -> None:
    folder = tmp_path / "run"
    result = run(hub, "--swap", "2", "--epochs", "1", "--run-dir", str(folder))
    assert result.exit_code == 0, result.output
    assert "swap: 2" in (folder / "config.yaml").read_text()
    assert not (folder / "swap").exists()
    files = {file.name for file in (folder / "checkpoints" / "last").iterdir()}
    assert {f"encoder.{name}.safetensors" for name in NAMES} < files


def test_other_methods_refuse_to_swap(hub: HubSpec, tmp_path: Path, noise: None) -> None:
    result = run(hub, "--method", "ensemble-j", "--swap", "2", "--run-dir", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert "hub.swap is 2, but method 'ensemble-j' needs all its encoders" in result.output
    assert "methods that swap: hub-pathway" in result.output
    assert not (tmp_path / "run").exists()


def test_torchrun_and_swap_are_refused(
    hub: HubSpec, tmp_path: Path, noise: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "n_processes", lambda: 2)
    monkeypatch.setattr(distributed, "from_leader", lambda make: make())
    result = run(hub, "--swap", "2", "--batch-size", "8", "--run-dir", str(tmp_path / "run"))
    assert result.exit_code == 2
    assert "hub.swap is 2, but torchrun started 2 processes" in result.output
    assert not (tmp_path / "run").exists()


def test_swap_must_leave_an_encoder(hub: HubSpec, noise: None) -> None:
    result = run(hub, "--swap", "0")
    assert result.exit_code == 2
    assert "hub.swap" in result.output


def test_a_move_to_another_device_keeps_the_statistics(tmp_path: Path) -> None:
    """Module.to keeps parameters, but makes buffers anew."""
    spec = library_spec("torchvision:shufflenet_v2_x0_5", 1024)
    hub = load_hub(write_hub(tmp_path / "norm", [spec]))
    images_BCHW = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    encoders = SwappedEncoders(hub, (), True, swap=Swap(1, tmp_path / "swap"))
    expected_BD = build_encoder(hub, hub.encoders[0])(images_BCHW)
    encoders._apply(torch.clone)
    with torch.no_grad():
        torch.testing.assert_close(encoders[0](images_BCHW), expected_BD)
