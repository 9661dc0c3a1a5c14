"""The training loop of all methods: steps, schedule, evaluation, checkpoints, log."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from typing_extensions import TypedDict

from hubrl.encoders import is_encoder_weight
from hubrl.files import DamagedFileError
from hubrl.finite import (
    ROLLBACK_SCALE,
    NotFiniteError,
    Rollbacks,
    are_finite,
    first_not_finite,
)
from hubrl.run_folder import CsvTable
from hubrl.signals import StopSignal
from hubrl.state_folder import (
    StoredCount,
    has_state,
    load_parts,
    read_state,
    repair_state,
    save_state,
)
from vision_tasks import distributed
from vision_tasks.config import VisionConfig
from vision_tasks.data import Data
from vision_tasks.methods import Losses, Method
from vision_tasks.swap import swapped_encoders

# Shape letters: B batch, O outputs, C H W image.

RESULTS_FILE = "results.json"
EPOCHS_FILE = "epochs.csv"
#: Checkpoint of the best validation score, where training may stop early.
BEST = "best"
#: Images of an evaluation step; a training step needs more memory for each.
EVALUATION_BATCH = 128

Batch = tuple[Tensor, Tensor]


class Position(NamedTuple):
    """How far a run is: phases, epochs of this phase and steps of this epoch that are done."""

    phase: StoredCount = 0
    epoch: StoredCount = 0
    step: StoredCount = 0


class Scores(TypedDict):
    """What a phase has come to."""

    best: float | None
    """The best validation score of the phase."""
    bad_epochs: StoredCount
    """Epochs since then."""
    seconds: float
    """Of training, in all phases."""


class EpochLosses(TypedDict):
    """Losses of the steps of an unfinished epoch."""

    sums: dict[str, float]
    n_steps: StoredCount


class Checkpoint(TypedDict):
    """``state.json`` of a run."""

    position: Position
    scores: Scores
    losses: NotRequired[EpochLosses]
    n_rollbacks: NotRequired[Rollbacks]


class Results(TypedDict):
    """``results.json`` of a finished run."""

    method: str
    task: Literal["classification", "landmarks"]
    data: str
    hub: NotRequired[str]
    seed: int
    n_training_images: NotRequired[int]
    train_seconds: float
    validation: dict[str, dict[str, float]]
    """Scores of the method, at ``""``, and of others that are results of the run."""
    test: dict[str, dict[str, float]]
    """The same on the test images."""


class Trainer:
    """
    Trains a method phase by phase; a run that was stopped goes on at its last checkpoint.

    All random numbers of a step follow from the seed and the step's position, so that a run which
    was resumed gives the same weights as one that was not.

    :param method: to be trained, on its device
    :param data: its images
    :param config: of the run
    :param folder: of the run
    :param n_rollbacks: how often it went back to its last checkpoint, each time with half the
        learning rate; None: as the checkpoint says
    """

    def __init__(
        self,
        method: Method,
        data: Data,
        config: VisionConfig,
        folder: Path,
        n_rollbacks: int | None = None,
    ) -> None:
        self._method, self._data, self._config, self._folder = method, data, config, folder
        distributed.share_weights(method)
        self._swapped = swapped_encoders(method)
        self._device = next(method.parameters()).device
        self._last = folder / "checkpoints" / "last"
        self._stopped_by: int | None = None
        self._position = Position()
        self._scores: Scores = {"best": None, "bad_epochs": 0, "seconds": 0.0}
        self._losses: EpochLosses = {"sums": {}, "n_steps": 0}
        self.n_rollbacks = 0
        _repair(self._last)
        if has_state(self._last):
            state = read_state(self._last, Checkpoint)
            self._position, self._scores = state["position"], state["scores"]
            self._losses = state.get("losses", self._losses)
            self.n_rollbacks = state.get("n_rollbacks", 0)
        if n_rollbacks is not None:
            self.n_rollbacks = n_rollbacks
        self._log = _Log(folder, self.steps_done) if distributed.rank() == 0 else None

    def run(self, stop: StopSignal) -> int | None:
        """
        Train what is left, then score the test images.

        :param stop: asked after each step
        :return: None, or the number of the signal that ended the run after a checkpoint
        :raises NotFiniteError: if a loss, a gradient or a weight is NaN or infinite
        """
        try:
            return self._run(stop)
        finally:
            if self._log is not None:
                self._log.close()

    def _run(self, stop: StopSignal) -> int | None:
        phases = self._method.phases
        for phase in phases[self._position.phase :]:
            optimizer = self._begin(phase)
            if self._position != Position(self._position.phase):  # it was resumed
                # Running means that were saved in the middle of an epoch are not taken up yet.
                self._method.train(self._position.step > 0)
                self._load(self._parts(optimizer), self._last)
            while self._position.epoch < self._config.train.epochs:
                self._train_epoch(optimizer, stop)
                if self._stopped_by is not None:
                    self._save(self._last, optimizer)
                    return self._stopped_by
                self._end_epoch(phase, optimizer)
            # A next phase shall not hold what this one's optimizer did.
            del optimizer
            self._method.zero_grad(set_to_none=True)
            self._end_phase(phase)
        self._write_results()
        return None

    @property
    def _epoch_steps(self) -> int:
        return epoch_steps(self._data, self._config.train.batch_size)

    @property
    def _phase_steps(self) -> int:
        return self._config.train.epochs * self._epoch_steps

    @property
    def steps_done(self) -> int:
        """Of all phases."""
        return self._position.phase * self._phase_steps + self._phase_steps_done()

    def _phase_steps_done(self) -> int:
        return self._position.epoch * self._epoch_steps + self._position.step

    def _begin(self, phase: str) -> AdamW:
        self._method.begin(phase, partial(self._on_device, self._data.train))
        if self._swapped is not None:
            self._swapped.learn(self._optimizer, self._schedule)
        optimizer = self._optimizer(self._method.parameters())
        assert optimizer is not None
        return optimizer

    def _optimizer(self, weights: Iterable[Tensor]) -> AdamW | None:
        """Of those that learn; None where none does."""
        train = self._config.train
        groups: dict[tuple[bool, bool], list[Tensor]] = {}
        for weight in weights:
            if is_encoder_weight(weight) and train.encoder_lr_scale == 0:
                weight.requires_grad_(False)
            if weight.requires_grad:
                decays = getattr(weight, "decays", weight.ndim > 1)
                groups.setdefault((is_encoder_weight(weight), decays), []).append(weight)
        settings = [
            {
                "params": group,
                "lr_scale": train.encoder_lr_scale if is_encoder else 1.0,
                "weight_decay": train.weight_decay if decays else 0.0,
            }
            for (is_encoder, decays), group in groups.items()
        ]
        return AdamW(settings) if settings else None

    def _schedule(self, optimizer: Optimizer) -> None:
        rate = self._config.train.learning_rate * ROLLBACK_SCALE**self.n_rollbacks
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"] * self._lr_scale()

    def _train_epoch(self, optimizer: Optimizer, stop: StopSignal) -> None:
        sums = self._losses["sums"]
        start, first = time.perf_counter(), self._position.step
        self._method.train()
        for step, (images_BCHW, targets_B) in enumerate(self._epoch_batches(), first):
            for name, value in self._step(optimizer, images_BCHW, targets_B).items():
                sums[name] = sums.get(name, 0.0) + value
            self._losses["n_steps"] += 1
            self._position = self._position._replace(step=step + 1)
            start = self._count_seconds(start)
            save_freq = self._config.train.save_freq
            if save_freq and (step + 1) % save_freq == 0:
                self._save(self._last, optimizer)
            # All processes end at one step, or those that went on would wait for the others.
            self._stopped_by = distributed.largest(stop.number or 0) or None
            if self._stopped_by is not None:
                break
        self._count_seconds(start)

    def _count_seconds(self, start: float) -> float:
        """Until now, from where the next ones count."""
        now = time.perf_counter()
        self._scores["seconds"] += now - start
        return now

    def _step(
        self, optimizer: Optimizer, images_BCHW: Tensor, targets_B: Tensor
    ) -> dict[str, float]:
        torch.manual_seed(self._seed_of(*self._position, distributed.rank()))
        data = self._config.data
        images_BCHW = augment(images_BCHW, flip=data.flip, shift=data.shift)
        self._method.progress = self._phase_steps_done() / self._phase_steps
        losses = self._method.loss(images_BCHW.to(self._device), targets_B.to(self._device))
        self._check_losses(losses)
        self._schedule(optimizer)
        optimizer.zero_grad()
        try:
            losses.total.backward()
        except NotFiniteError as error:  # swapped encoders learn in there
            raise self._not_finite(str(error)) from error
        distributed.average_gradients(self._method.parameters())
        self._check_gradients()
        optimizer.step()
        return {name: float(value.detach()) for name, value in losses.parts.items()}

    def _check_losses(self, losses: Losses) -> None:
        # All processes go on, or none.
        mean = distributed.mean_over_processes(losses.total.detach())
        if not torch.isfinite(mean):
            name, what = first_not_finite(losses.parts) or ("total", "no finite number")
            raise self._not_finite(f"the loss ({name}) is {what}")

    def _check_gradients(self) -> None:
        named = self._method.named_parameters()
        gradients = {name: weight.grad for name, weight in named if weight.grad is not None}
        if not are_finite(gradients.values()):
            name, what = first_not_finite(gradients) or ("all weights together", "infinity")
            raise self._not_finite(f"the gradient of {name} holds {what}")

    def _check_weights(self) -> None:
        bad = first_not_finite(dict(self._method.named_parameters()))
        if bad is not None:
            raise self._not_finite(f"weight {bad[0]} holds {bad[1]}")

    def _not_finite(self, what: str) -> NotFiniteError:
        return NotFiniteError(f"{self._folder}, step {self.steps_done:,}: {what}")

    def _lr_scale(self) -> float:
        """Linear warm-up, then a cosine to 0 at the end of the phase."""
        done, total = self._phase_steps_done(), self._phase_steps
        warmup = self._config.train.warmup * total
        if done < warmup:
            return (done + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))

    def _seed_of(self, *place: int) -> int:
        seed = np.random.SeedSequence((self._config.train.seed, *place))
        return int(seed.generate_state(1)[0])

    def _epoch_batches(self) -> Iterator[Batch]:
        """What is left of an epoch, in its random order; of each step this process' share."""
        train, dataset = self._config.train, self._data.train
        generator = torch.Generator().manual_seed(self._seed_of(*self._position[:2]))
        steps = torch.randperm(_length(dataset), generator=generator).split(train.batch_size)
        n, rank = distributed.n_processes(), distributed.rank()
        rows = [step.chunk(n)[rank].tolist() for step in steps[: self._epoch_steps]]
        loader: DataLoader[Any] = DataLoader(
            dataset, batch_sampler=rows[self._position.step :], num_workers=train.n_workers
        )
        label = f"epoch {self._position.epoch + 1}/{train.epochs}"
        bar = tqdm(loader, label, leave=False, disable=not sys.stdout.isatty() or rank > 0)
        return iter(bar)

    def _on_device(self, dataset: Dataset[Any]) -> Iterator[Batch]:
        batches = batches_of(dataset, self._config.train.n_workers)
        return ((images.to(self._device), targets.to(self._device)) for images, targets in batches)

    def _end_epoch(self, phase: str, optimizer: Optimizer) -> None:
        n_steps = self._losses["n_steps"]
        losses = {name: total / n_steps for name, total in self._losses["sums"].items()}
        self._losses = {"sums": {}, "n_steps": 0}
        train, task = self._config.train, self._method.task
        distributed.average_buffers(self._method)
        self._method.eval()
        self._method.choose(partial(self._on_device, self._data.validation))
        scores = distributed.agreed(self._evaluate(self._data.validation))
        score, best = scores[""][task.metric], self._scores["best"]
        is_better = best is None or (score > best if task.is_more_better else score < best)
        self._scores["best"] = score if is_better else best
        self._scores["bad_epochs"] = 0 if is_better else self._scores["bad_epochs"] + 1
        is_over = 0 < train.patience <= self._scores["bad_epochs"]
        steps = self.steps_done
        epoch = train.epochs if is_over else self._position.epoch + 1
        self._position = Position(self._position.phase, epoch)
        if is_better and train.patience:
            self._save(self._best(phase), optimizer)
        # A row of an epoch that no checkpoint has is taken back when the run is resumed.
        if self._log is not None:
            self._log.write(steps, phase, self._scores["seconds"], losses, scores)
        self._save(self._last, optimizer)
        if self._log is not None:
            advice = self._method.advice(losses) if losses else None
            if advice is not None:
                print(advice, file=sys.stderr, flush=True)

    def _end_phase(self, phase: str) -> None:
        if self._config.train.patience:
            self._load({"method": self._method}, self._best(phase))
        self._position = Position(self._position.phase + 1)
        self._scores |= {"best": None, "bad_epochs": 0}

    def _best(self, phase: str) -> Path:
        """Checkpoint of a phase; the last one's is the run's."""
        is_last = phase == self._method.phases[-1]
        return self._folder / "checkpoints" / (BEST if is_last else f"{BEST}-{phase}")

    def _evaluate(self, dataset: Dataset[Any]) -> dict[str, dict[str, float]]:
        n_workers = self._config.train.n_workers
        return evaluate(self._method, dataset, self._device, n_workers)

    def _write_results(self) -> None:
        if distributed.rank() > 0:
            return
        results: Results = {
            "method": self._config.method,
            "task": self._config.task,
            "data": self._config.data.name,
            "hub": self._config.hub.name,
            "seed": self._config.train.seed,
            "n_training_images": _length(self._data.train),
            "train_seconds": round(self._scores["seconds"], 3),
            "validation": self._evaluate(self._data.validation),
            "test": self._evaluate(self._data.test),
        }
        temporary = self._folder / f".{RESULTS_FILE}.new"
        temporary.write_text(json.dumps(results, indent=1))
        temporary.rename(self._folder / RESULTS_FILE)

    def _parts(self, optimizer: Optimizer) -> dict[str, Any]:
        return {"method": self._method, "optimizer": optimizer}

    def _save(self, folder: Path, optimizer: Optimizer) -> None:
        self._check_weights()
        distributed.average_buffers(self._method)
        distributed.leave_pending_to_leader(self._method)
        if distributed.rank() == 0:
            state: Checkpoint = {
                "position": self._position,
                "scores": self._scores,
                "losses": self._losses,
                "n_rollbacks": self.n_rollbacks,
            }
            files = () if self._swapped is None else self._swapped.files()
            save_state(self._parts(optimizer), state, folder, files)
        distributed.wait()

    def _load(self, parts: dict[str, Any], folder: Path) -> None:
        load_parts(parts, folder)
        distributed.leave_pending_to_leader(self._method)
        if self._swapped is not None:
            self._swapped.restore(folder)


@torch.no_grad()
def evaluate(
    method: Method, dataset: Dataset[Any], device: torch.device, n_workers: int = 0
) -> dict[str, dict[str, float]]:
    """
    Scores of each of the method's results on a data set; those of the method itself at ``""``.
    """
    method.eval()
    outputs: dict[str, list[Tensor]] = {}
    targets = []
    for images_BCHW, targets_B in batches_of(dataset, n_workers):
        targets.append(targets_B)
        for name, outputs_BO in method.results(images_BCHW.to(device)).items():
            outputs.setdefault(name, []).append(outputs_BO.cpu())
    all_targets = torch.cat(targets)
    return {
        name: method.task.scores(torch.cat(parts), all_targets) for name, parts in outputs.items()
    }


def augment(images_BCHW: Tensor, *, flip: bool, shift: int) -> Tensor:
    """
    Mirror half of the images, and move each by up to ``shift`` pixels, borders repeated.

    :param images_BCHW: uint8
    """
    n, _, height, width = images_BCHW.shape
    if flip:
        is_flipped_B = torch.rand(n) < 0.5
        images_BCHW = torch.where(is_flipped_B.view(-1, 1, 1, 1), images_BCHW.flip(3), images_BCHW)
    if shift == 0:
        return images_BCHW
    offsets_2B = torch.randint(-shift, shift + 1, (2, n, 1))
    rows_BH = (torch.arange(height) + offsets_2B[0]).clamp(0, height - 1)
    columns_BW = (torch.arange(width) + offsets_2B[1]).clamp(0, width - 1)
    index_B = torch.arange(n).view(-1, 1, 1)
    # Indexed dimensions around a slice come first.
    moved_BHWC = images_BCHW[index_B, :, rows_BH[:, :, None], columns_BW[:, None, :]]
    return moved_BHWC.permute(0, 3, 1, 2)


class _Log:
    """``epochs.csv``, TensorBoard events and a line on the screen for each epoch."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        self._table = CsvTable(folder / EPOCHS_FILE, "step", steps_done)
        self._writer = SummaryWriter(str(folder), purge_step=steps_done + 1)

    def write(
        self,
        step: int,
        phase: str,
        seconds: float,
        losses: dict[str, float],
        scores: dict[str, dict[str, float]],
    ) -> None:
        values = {f"train/{name}": value for name, value in losses.items()}
        values |= {
            "/".join(filter(None, ("validation", member, name))): value
            for member, each in scores.items()
            for name, value in each.items()
        }
        self._table.append({"step": step, "phase": phase, "seconds": round(seconds, 3), **values})
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        numbers = "  ".join(
            f"{name} {value:.4g}" for name, value in values.items() if name.count("/") == 1
        )
        print(f"{phase}, step {step:,}, {seconds:.0f} s:  {numbers}", flush=True)

    def close(self) -> None:
        """End the thread that writes the events."""
        self._writer.close()


def _repair(folder: Path) -> None:
    """By the first process; where nothing is whole, all of them find that when they read."""
    if distributed.rank() == 0:
        with contextlib.suppress(DamagedFileError):
            repair_state(folder)
    distributed.wait()


def epoch_steps(data: Data, batch_size: int) -> int:
    """Steps of an epoch; processes have equal shares of each, so its last images are left out."""
    n = _length(data.train)
    return n // batch_size if distributed.n_processes() > 1 else math.ceil(n / batch_size)


def batches_of(dataset: Dataset[Any], n_workers: int) -> DataLoader[Any]:
    """Images and targets in their order, as methods look at them and evaluation does."""
    return DataLoader(dataset, EVALUATION_BATCH, num_workers=n_workers)


def _length(dataset: Dataset[Any]) -> int:
    return len(dataset)  # type: ignore[arg-type]
