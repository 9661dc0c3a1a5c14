"""The training loop: schedule, groups, resume, early stop, results, bad losses."""

from __future__ import annotations

import csv
import itertools
import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_images import (
    SIZE,
    StopsAfter,
    quadrant_data,
    quadrant_images,
    small_vision_config,
    write_rgb_hub,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from hubrl.encoders import is_encoder_weight
from hubrl.finite import NotFiniteError
from hubrl.run_folder import create_folder, read_rows
from hubrl.signals import StopSignal
from hubrl.specs import load_hub
from vision_tasks import runs, training
from vision_tasks.config import VisionConfig, dump_config
from vision_tasks.methods import Losses, Settings, build_method
from vision_tasks.tasks import Classification
from vision_tasks.training import Position, Trainer, augment


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return write_rgb_hub(tmp_path / "rgb")


def trainer(config: VisionConfig, folder: Path, n_rollbacks: int | None = None) -> Trainer:
    settings = Settings(config.train.seed, SIZE)
    method = build_method(config.method, load_hub(config.hub.name), Classification(4), settings)
    return Trainer(method, quadrant_data(), config, folder, n_rollbacks)


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "method.safetensors")


@pytest.mark.parametrize("save_freq", [0, 2])
@pytest.mark.parametrize("steps", [1, 4, 6])
def test_a_resumed_run_gives_the_same_bytes(
    hub: Path, tmp_path: Path, steps: int, save_freq: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorBoard reads files by name, and of one second the tenth comes before the ninth.
    seconds = itertools.count(1_000_000_000)
    clock = SimpleNamespace(time=lambda: next(seconds))
    monkeypatch.setattr(event_file_writer, "time", clock)
    config = small_vision_config(hub, train__save_freq=save_freq, data__shift=2)
    assert trainer(config, tmp_path / "whole").run(StopSignal()) is None
    assert trainer(config, tmp_path / "cut").run(StopsAfter(steps)) == 15
    assert trainer(config, tmp_path / "cut").run(StopSignal()) is None
    whole, cut = last_weights(tmp_path / "whole"), last_weights(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    results = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("whole", "cut")]
    assert results[0]["test"] == results[1]["test"]
    rows = [read_rows(tmp_path / name / "epochs.csv") for name in ("whole", "cut")]
    assert [row["step"] for row in rows[1]] == ["3", "6"]
    without_seconds = [[{**row, "seconds": ""} for row in each] for each in rows]
    assert without_seconds[0] == without_seconds[1], "losses of all steps of an epoch"
    events = EventAccumulator(str(tmp_path / "cut")).Reload()
    assert [event.step for event in events.Scalars("train/task")] == [3, 6]


def test_seconds_of_a_checkpoint_are_those_of_its_steps(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten for each step; of two epochs of three steps, cut at the fifth and begun again there."""
    now = 0.0
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now))
    step, save = Trainer._step, Trainer._save
    saved = []

    def ten_seconds(*args: Any) -> dict[str, float]:
        nonlocal now
        now += 10
        return step(*args)

    def killed(run: Trainer, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        save(run, folder, optimizer)
        saved.append(json.loads((folder / "state.json").read_text())["scores"]["seconds"])
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_step", ten_seconds)
    monkeypatch.setattr(Trainer, "_save", killed)
    config = small_vision_config(hub, "single:a", train__save_freq=2)
    with pytest.raises(KeyboardInterrupt):
        trainer(config, tmp_path).run(StopSignal())
    trainer(config, tmp_path).run(StopSignal())
    assert saved == [20, 30, 50, 60]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["train_seconds"] == 60


def test_seeds_differ(hub: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        trainer(small_vision_config(hub, train__seed=seed), tmp_path / str(seed)).run(StopSignal())
    a, b = last_weights(tmp_path / "0"), last_weights(tmp_path / "1")
    assert not torch.equal(a["model.heads.a.weight"], b["model.heads.a.weight"])


def test_members_of_an_ensemble_are_the_single_models(hub: Path, tmp_path: Path) -> None:
    """To the last digit, since the sum of the losses leaves each gradient as it was."""
    for method in ("ensemble-i", "single:b"):
        config = small_vision_config(hub, method)
        trainer(config, tmp_path / method).run(StopSignal())
    ensemble, single = (
        json.loads((tmp_path / name / "results.json").read_text())["test"]
        for name in ("ensemble-i", "single:b")
    )
    assert ensemble["b"] == single[""]
    assert set(ensemble) == {"", "a", "b", "c"}
    with (tmp_path / "ensemble-i" / "epochs.csv").open() as lines:
        last = list(csv.DictReader(lines))[-1]
    with (tmp_path / "single:b" / "epochs.csv").open() as lines:
        alone = list(csv.DictReader(lines))[-1]
    assert last["validation/b/accuracy"] == alone["validation/accuracy"]


def test_learning_rates_by_hand(hub: Path, tmp_path: Path) -> None:
    """6 steps; 2 of them warm-up, so the cosine has 4: 1, .854, .5, .146."""
    config = small_vision_config(hub, train__warmup=1 / 3, train__encoder_lr_scale=0.25)
    seen: list[tuple[float, float]] = []
    run = trainer(config, tmp_path)
    make = run._optimizer

    def watched(weights: object) -> torch.optim.AdamW:
        optimizer = make(weights)

        def note(*_: object) -> None:
            rates = {is_encoder_weight(g["params"][0]): g["lr"] for g in optimizer.param_groups}
            seen.append((rates[False], rates[True]))

        optimizer.register_step_pre_hook(note)
        return optimizer

    run._optimizer = watched
    run.run(StopSignal())
    scales = [1 / 3, 2 / 3, *(0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4))]
    assert [rates[0] for rates in seen] == pytest.approx([1e-3 * scale for scale in scales])
    assert [rates[1] for rates in seen] == pytest.approx([0.25e-3 * scale for scale in scales])


def test_biases_do_not_decay_and_scale_0_freezes(hub: Path, tmp_path: Path) -> None:
    run = trainer(small_vision_config(hub, train__encoder_lr_scale=0.0), tmp_path)
    for group in run._optimizer(run._method.parameters()).param_groups:
        decays = {weight.ndim > 1 for weight in group["params"]}
        assert decays == {group["weight_decay"] == 0.05}
        assert not any(is_encoder_weight(weight) for weight in group["params"])
    run.run(StopSignal())
    for name in "abc":
        old = load_file(hub / f"{name}.safetensors")
        new = last_weights(tmp_path)
        assert all(
            torch.equal(new[f"model.pathway.encoders.owned.{name}.trunk.{key}"], value)
            for key, value in old.items()
        )


def test_early_stop_takes_the_best_weights(hub: Path, tmp_path: Path) -> None:
    config = small_vision_config(
        hub, "single:a", train__epochs=30, train__patience=2, train__learning_rate=1e-9
    )
    trainer(config, tmp_path).run(StopSignal())
    with (tmp_path / "epochs.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 3  # the first is the best, and nothing moves
    results = json.loads((tmp_path / "results.json").read_text())
    best = max(float(row["validation/accuracy"]) for row in rows)
    assert results["validation"][""]["accuracy"] == pytest.approx(best)


def test_a_loaded_run_has_the_weights_of_its_results(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the best epoch, where training stopped early."""
    monkeypatch.setattr(runs, "load_data", lambda _: (quadrant_data(), Classification(4)))
    config = small_vision_config(
        hub, "single:a", train__epochs=4, train__patience=2, train__learning_rate=0.1
    )
    scores = iter((0.5, 0.9, 0.4, 0.3))
    evaluate = training.evaluate

    def falling(*args: Any) -> dict[str, dict[str, float]]:
        found = evaluate(*args)
        found[""]["accuracy"] = next(scores, 0.0)
        return found

    create_folder(tmp_path / "run", dump_config(config))
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", falling)
        trainer(config, tmp_path / "run").run(StopSignal())
    loaded = runs.load_run(tmp_path / "run").method.state_dict()
    best = load_file(tmp_path / "run" / "checkpoints" / "best" / "method.safetensors")
    last = last_weights(tmp_path / "run")
    assert all(torch.equal(loaded[key], best[key]) for key in best)
    assert not all(torch.equal(loaded[key], last[key]) for key in last)


@pytest.mark.parametrize("name", ["distill", "knowledge-flow", "logme", "hub-pathway"])
def test_a_loaded_run_has_the_modules_that_training_left(
    name: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "load_data", lambda _: (quadrant_data(), Classification(4)))
    config = small_vision_config(hub, name, train__epochs=1)
    create_folder(tmp_path / "run", dump_config(config))
    trained = trainer(config, tmp_path / "run")
    trained.run(StopSignal())
    images = quadrant_data().test.tensors[0]
    loaded = runs.load_run(tmp_path / "run").method.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), trained._method.eval()(images))


def test_another_number_of_steps_in_an_epoch_is_refused(tmp_path: Path) -> None:
    """As where other processes go on with a run."""
    data = quadrant_data()
    runs.note_data(tmp_path, data, 3)
    runs.check_data(tmp_path, data, 3)
    runs.check_data(tmp_path, data)
    with pytest.raises(ValueError, match="began with 3 steps in an epoch, but would go on with 2"):
        runs.check_data(tmp_path, data, 2)


def test_a_soup_is_chosen_at_the_end_of_each_epoch(hub: Path, tmp_path: Path) -> None:
    """So that its curve, and what training stops by, is that of what would be the result."""
    config = small_vision_config(hub, "model-soup", train__epochs=3, train__patience=3)
    trainer(config, tmp_path).run(StopSignal())
    results = json.loads((tmp_path / "results.json").read_text())
    rows = read_rows(tmp_path / "epochs.csv")
    for row in rows:
        alone = [float(row[f"validation/{name}/accuracy"]) for name in "abc"]
        assert float(row["validation/accuracy"]) >= max(alone)
    best = max(float(row["validation/accuracy"]) for row in rows)
    assert results["validation"][""]["accuracy"] == pytest.approx(best, abs=1e-6)


def test_each_phase_has_a_best_checkpoint_of_its_own(hub: Path, tmp_path: Path) -> None:
    """A run that was killed between a best and a last checkpoint goes back a phase."""
    config = small_vision_config(hub, "distill", train__patience=2)
    trainer(config, tmp_path / "whole").run(StopSignal())
    cut = trainer(config, tmp_path / "cut")
    save = cut._save

    def killed(folder: Path, optimizer: torch.optim.Optimizer) -> None:
        save(folder, optimizer)
        if folder.name == "best":
            raise KeyboardInterrupt

    cut._save = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cut.run(StopSignal())
    assert trainer(config, tmp_path / "cut").run(StopSignal()) is None
    whole, resumed = last_weights(tmp_path / "whole"), last_weights(tmp_path / "cut")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_kill_between_a_row_and_its_checkpoint(hub: Path, tmp_path: Path) -> None:
    cut = trainer(small_vision_config(hub), tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    cut._save = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cut.run(StopSignal())
    trainer(small_vision_config(hub), tmp_path).run(StopSignal())
    assert [row["step"] for row in read_rows(tmp_path / "epochs.csv")] == ["3", "6"]


def test_a_loss_that_is_no_number_stops_at_once(hub: Path, tmp_path: Path) -> None:
    config = small_vision_config(hub, "single:a")
    run = trainer(config, tmp_path)
    run._method.loss, n_steps = _breaks_after(run._method.loss, 4), 4
    with pytest.raises(NotFiniteError, match=r", step 4: the loss \(task\) is NaN"):
        run.run(StopSignal())
    state = json.loads((tmp_path / "checkpoints" / "last" / "state.json").read_text())
    assert state["position"] == [0, 1, 0]
    assert all(value.isfinite().all() for value in last_weights(tmp_path).values())
    assert n_steps == 4


def test_a_gradient_that_is_no_number_changes_no_weight(hub: Path, tmp_path: Path) -> None:
    run = trainer(small_vision_config(hub, "single:a"), tmp_path)
    before = {name: weight.clone() for name, weight in run._method.named_parameters()}
    run._method.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    message = r", step 0: the gradient of model\.head\.weight holds (NaN|infinity)"
    with pytest.raises(NotFiniteError, match=message):
        run.run(StopSignal())
    for name, weight in run._method.named_parameters():
        assert torch.equal(weight, before[name]), name


def test_a_weight_that_is_no_number_is_not_saved(hub: Path, tmp_path: Path) -> None:
    run = trainer(small_vision_config(hub, "single:a"), tmp_path)
    optimizer = torch.optim.SGD(run._method.parameters())
    with torch.no_grad():
        run._method.model.head.bias[1] = math.inf
    with pytest.raises(NotFiniteError, match=r"weight model\.head\.bias holds infinity"):
        run._save(tmp_path / "checkpoints" / "last", optimizer)
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_rolled_back_learns_at_half_the_rate(hub: Path, tmp_path: Path) -> None:
    config = small_vision_config(hub, "single:a", train__epochs=3, train__warmup=0.0)
    rates = {}
    for n_rollbacks in (None, 1, 2):
        run = trainer(config, tmp_path / str(n_rollbacks), n_rollbacks)
        assert run.run(StopsAfter(4)) == 15
        file = tmp_path / str(n_rollbacks) / "checkpoints" / "last" / "state.json"
        assert json.loads(file.read_text())["n_rollbacks"] == (n_rollbacks or 0)
        again = trainer(config, tmp_path / str(n_rollbacks))
        optimizer = again._begin("train")
        again._schedule(optimizer)
        rates[n_rollbacks] = [group["lr"] for group in optimizer.param_groups]
    assert rates[1] == pytest.approx([rate / 2 for rate in rates[None]])
    assert rates[2] == pytest.approx([rate / 4 for rate in rates[None]])


def test_a_collapse_is_told(
    hub: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trainer(small_vision_config(hub, train__epochs=1), tmp_path)
    run.run(StopSignal())
    with (tmp_path / "epochs.csv").open() as lines:
        (row,) = csv.DictReader(lines)
    shares = [float(row[f"train/probability/{name}"]) for name in "abc"]
    assert sum(shares) == pytest.approx(1)
    assert "collapse" not in capsys.readouterr().err
    losses = {"probability/a": 0.02, "probability/b": 0.96, "probability/c": 0.02}
    told = run._method.advice(losses)
    assert told is not None
    assert told.startswith(
        "pathway collapse: encoder 'b' has 96% of the pathway probability; raise"
    )
    assert "hub.exploration_coef (now 0.3)" in told
    assert "--method single:b" in told
    monkeypatch.setattr(run._method.model.pathway, "always_active", ("a", "c"))
    assert run._method.advice(losses) is None  # nothing was chosen
    run._method.advice = lambda losses: f"{losses['task']:.0f} things"
    run._position = Position()
    run.run(StopSignal())
    assert "things" in capsys.readouterr().err


def test_no_thread_is_left_behind(hub: Path, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    trainer(small_vision_config(hub, "single:a"), tmp_path).run(StopSignal())
    assert set(threading.enumerate()) <= before


def _breaks_after(loss: object, n_steps: int) -> object:
    left = [n_steps]

    def broken(*args: object) -> Losses:
        left[0] -= 1
        losses = loss(*args)  # type: ignore[operator]
        if left[0] >= 0:
            return losses
        return Losses(losses.total * math.nan, {"task": losses.parts["task"] * math.nan})

    return broken


def test_shifted_images_repeat_their_borders() -> None:
    """Against a plain loop over pixels."""
    images, _ = quadrant_images(6, seed=0)
    torch.manual_seed(2)
    moved = augment(images, flip=False, shift=3)
    torch.manual_seed(2)
    offsets = torch.randint(-3, 4, (2, 6, 1))
    for b in range(6):
        dy, dx = int(offsets[0, b]), int(offsets[1, b])
        for y, x in ((0, 0), (5, 9), (35, 35), (17, 0)):
            expected = images[b, :, min(max(y + dy, 0), 35), min(max(x + dx, 0), 35)]
            assert torch.equal(moved[b, :, y, x], expected)


def test_half_of_the_images_are_mirrored() -> None:
    images, _ = quadrant_images(200, seed=0)
    torch.manual_seed(2)
    flipped = augment(images, flip=True, shift=0)
    is_same = [torch.equal(a, b) for a, b in zip(images, flipped, strict=True)]
    is_mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(images, flipped, strict=True)]
    assert all(a != b for a, b in zip(is_same, is_mirrored, strict=True))
    assert 70 < sum(is_mirrored) < 130
