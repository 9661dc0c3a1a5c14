"""``python -m vision_tasks.swap_memory``: peak memory of training, with and without swapping."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import TensorDataset

from hubrl import cli
from hubrl.files import file_sha256
from hubrl.signals import StopSignal
from hubrl.specs import EncoderSpec, HubSpec
from vision_tasks.config import BUILT_IN_CONFIGS, VisionConfig, load_config
from vision_tasks.data import ImageData
from vision_tasks.methods import Losses, Method, Settings, build_method
from vision_tasks.process_memory import MB, read_memory
from vision_tasks.swap import SWAP_FOLDER, Swap
from vision_tasks.tasks import Classification
from vision_tasks.training import Trainer

# Shape letters: B batch, C H W image.

#: Peak of the large hub with swapping over that of a hub of two without.
GOAL = 1.3
N_CLASSES = 100
SAMPLE_SECONDS = 0.005


class Side(NamedTuple):
    """A hub to train, and the encoders of it that are in memory."""

    n_encoders: int
    swap: int | None


class Sizes(NamedTuple):
    """What is the same for all sides."""

    image_size: int
    batch_size: int
    n_steps: int


class ProcessMemory(NamedTuple):
    """In MB (10^6 bytes); the time in seconds."""

    imported: float
    """Resident when everything is imported."""
    built: float
    """Peak until the method is built."""
    peak: float
    """Peak of all resident memory, mapped files included."""
    anonymous: float
    """Peak of what no file backs, seen every 5 ms."""
    mapped: float
    """Peak of what files back, which the system may drop at any time; seen every 5 ms."""
    step: float
    """Median of the steps but the first."""


@click.command("swap_memory")
@click.option("--n-encoders", default=20, type=click.IntRange(2), show_default=True)
@click.option("--swap", default=2, type=click.IntRange(1), show_default=True)
@click.option("--image-size", default=64, type=click.IntRange(32), show_default=True)
@click.option("--batch-size", default=12, type=click.IntRange(1), show_default=True)
@click.option("--steps", default=4, type=click.IntRange(2), show_default=True)
@click.option("--rounds", default=3, type=click.IntRange(1), show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="On the disk to measure.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the results here.")
def command(
    n_encoders: int,
    swap: int,
    image_size: int,
    batch_size: int,
    steps: int,
    rounds: int,
    folder: Path | None,
    file: Path | None,
) -> None:
    """
    Train hubs of ResNet-50 with two of them for each image, each in a process of its own.

    Medians of the rounds, in which all sides take turns. Linux alone tells the memory.
    """
    sizes = Sizes(image_size, batch_size, steps)
    sides = [Side(2, None), Side(2, swap), Side(n_encoders, swap), Side(n_encoders, None)]
    measured: dict[Side, list[ProcessMemory]] = {side: [] for side in sides}
    with cli.user_errors():
        cli.check_output("--json", file)
    with cli.user_errors(), tempfile.TemporaryDirectory(dir=folder) as temporary:
        weights = save_random_weights(Path(temporary))
        for number in range(rounds):
            for side in measured:
                click.echo(f"round {number + 1}: {_name(side)} ...", err=True)
                measured[side].append(measure(side, sizes, weights))
    medians = {side: _median(values) for side, values in measured.items()}
    if file is not None:
        rows = [side._asdict() | memory._asdict() for side, memory in medians.items()]
        file.write_text(json.dumps({**sizes._asdict(), "sides": rows}, indent=1) + "\n")
    _print(medians)


def save_random_weights(folder: Path) -> Path:
    """Weights of a ResNet-50; all encoders of a hub may name the same file."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    state = {key: value for key, value in resnet50().state_dict().items() if key[:3] != "fc."}
    save_file(state, folder / "resnet50.safetensors")
    return folder / "resnet50.safetensors"


def measure(side: Side, sizes: Sizes, weights: Path) -> ProcessMemory:
    """
    Train in a fresh process, and look at its memory.

    :raises ValueError: if it dies
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=train, args=(side, sizes, weights, theirs))
    process.start()
    theirs.close()
    anonymous, mapped = 0, 0
    while not ours.poll(SAMPLE_SECONDS):
        kinds = read_memory(process.pid)
        anonymous = max(anonymous, kinds.get("RssAnon", 0))
        mapped = max(mapped, kinds.get("RssFile", 0) + kinds.get("RssShmem", 0))
    try:
        told = ours.recv()
    except EOFError:
        process.join()
        raise ValueError(
            f"the process of {_name(side)} ended with code {process.exitcode}: if that is -9, "
            "memory was full; give a smaller --batch-size, --image-size or --n-encoders"
        ) from None
    process.join()
    return ProcessMemory(anonymous=anonymous / MB, mapped=mapped / MB, **told)


def train(side: Side, sizes: Sizes, weights: Path, tell: Connection) -> None:
    """What the process does: all of a run, its checkpoint and its results included."""
    imported = read_memory()["VmRSS"] / MB
    with tempfile.TemporaryDirectory(dir=weights.parent) as folder:
        swap = Swap(side.swap, Path(folder, SWAP_FOLDER)) if side.swap else None
        settings = Settings(0, sizes.image_size, swap=swap)
        hub = random_hub(side.n_encoders, sizes.image_size, weights)
        method = build_method("hub-pathway", hub, Classification(N_CLASSES), settings)
        built = read_memory()["VmHWM"] / MB
        starts = _watch(method)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = Trainer(method, random_images(sizes), _config(sizes), Path(folder))
            trainer.run(StopSignal())
        steps = [end - start for start, end in itertools.pairwise(starts)]
        told = {"imported": imported, "built": built, "peak": read_memory()["VmHWM"] / MB}
        tell.send(told | {"step": statistics.median(steps[1:] or steps)})


def random_hub(n_encoders: int, image_size: int, weights: Path) -> HubSpec:
    """ResNet-50 that differ in their names alone."""
    sha256 = file_sha256(weights)
    specs = [
        EncoderSpec(
            name=f"r{i}",
            architecture="torchvision:resnet50",
            features_dim=2048,
            image_size=(image_size, image_size),
            channels=3,
            license="MIT",
            source="random numbers",
            weights=weights.name,
            sha256=sha256,
        )
        for i in range(n_encoders)
    ]
    return HubSpec(name=f"resnet50x{n_encoders}", encoders=tuple(specs), folder=weights.parent)


def random_images(sizes: Sizes) -> ImageData:
    """Noise of any class."""
    torch.manual_seed(0)

    def noise(n: int) -> TensorDataset:
        shape = (n, 3, sizes.image_size, sizes.image_size)
        images_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8)
        return TensorDataset(images_BCHW, torch.randint(0, N_CLASSES, (n,)))

    train, validation, test = (noise(n) for n in (sizes.n_steps * sizes.batch_size, 12, 12))
    names = tuple(str(i) for i in range(N_CLASSES))
    return ImageData(train, validation, test, N_CLASSES, names)


def _config(sizes: Sizes) -> VisionConfig:
    overrides = {
        "data.image_size": sizes.image_size,
        "train.epochs": 1,
        "train.batch_size": sizes.batch_size,
        "train.device": "cpu",
    }
    return load_config(BUILT_IN_CONFIGS / "classification.yaml", overrides)


def _watch(method: Method) -> list[float]:
    """When each step of a method begins."""
    starts: list[float] = []
    loss = method.loss

    def timed_loss(images_BCHW: Tensor, targets_B: Tensor) -> Losses:
        starts.append(time.perf_counter())
        return loss(images_BCHW, targets_B)

    method.loss = timed_loss  # type: ignore[method-assign]
    return starts


def _median(values: list[ProcessMemory]) -> ProcessMemory:
    return ProcessMemory(*map(statistics.median, zip(*values, strict=True)))


def _name(side: Side) -> str:
    return f"{side.n_encoders} encoders" + (f", --swap {side.swap}" if side.swap else "")


def _print(medians: dict[Side, ProcessMemory]) -> None:
    table = Table(
        "hub", *ProcessMemory._fields, "peak / first", "anonymous / first", "above import"
    )
    first = next(iter(medians.values()))
    for side, memory in medians.items():
        ratios = (
            memory.peak / first.peak,
            memory.anonymous / first.anonymous,
            (memory.peak - memory.imported) / (first.peak - first.imported),
        )
        numbers = [f"{value:.0f}" for value in memory[:-1]] + [f"{memory.step:.2f}"]
        table.add_row(_name(side), *numbers, *(f"{ratio:.2f}" for ratio in ratios))
    console = Console(width=160)
    console.print(table)
    console.print(f"goal: peak of the large hub with --swap at most {GOAL} of the first")


if __name__ == "__main__":
    cli.run(command, "python -m vision_tasks.swap_memory")
