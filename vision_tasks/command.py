"""What the commands of all image tasks have in common: options, run folder, resume, exit codes."""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from hubrl import cli
from hubrl.fetching.recipes import load_cards
from hubrl.files import DamagedFileError
from hubrl.finite import NotFiniteError, advice
from hubrl.pathway import number_activated
from hubrl.precision import check_device, resolve_precision
from hubrl.run_folder import CONFIG_FILE, check_new_run, create_folder, held, note_command
from hubrl.sections import given_settings, read_mapping
from hubrl.signals import StopSignal
from hubrl.specs import lasting_name
from vision_tasks import distributed
from vision_tasks.config import BUILT_IN_CONFIGS, VisionConfig, dump_config, load_config
from vision_tasks.data import Data
from vision_tasks.data.images import UnreadableImageError
from vision_tasks.hubs import load_vision_hub
from vision_tasks.methods import METHODS, USED_BY, check_method
from vision_tasks.methods.method import Method
from vision_tasks.runs import build, check_data, load_data, note_data, open_run
from vision_tasks.swap import SWAP_FOLDER
from vision_tasks.training import RESULTS_FILE, Trainer, epoch_steps

#: The keys of the configuration that options override.
KEYS = {
    "data": "data.name",
    "root": "data.root",
    "image_size": "data.image_size",
    "limit": "data.limit",
    "hub": "hub.name",
    "top_k": "hub.top_k",
    "generator": "hub.generator",
    "exploration_coef": "hub.exploration_coef",
    "swap": "hub.swap",
    "random_init": "hub.random_init",
    "method": "method",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "learning_rate": "train.learning_rate",
    "seed": "train.seed",
    "device": "train.device",
}
FOLDER = click.Path(path_type=Path)
EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)
METHOD_HELP = ", ".join("single:ENCODER" if name == "single" else name for name in METHODS)


def vision_command(task: str, data_names: Iterable[str]) -> click.Command:
    """
    The command of a task.

    :param task: its name, which its configuration has, too
    :param data_names: for the help
    """

    shipped = read_mapping(BUILT_IN_CONFIGS / f"{task}.yaml")

    def default(option: str) -> str:
        section, dot, key = KEYS[option].partition(".")
        return f"  [default: {shipped[section][key] if dot else shipped[section]}]"

    @click.command(
        task,
        help=f"Train and test a method on {task}; options win over the file. Without --config the "
        f"settings are those of configs/vision/{task}.yaml.",
    )
    @click.option("--data", help=f"{', '.join(data_names)}." + default("data"))
    @click.option("--root", help="Folder of the data.  [default: where its package puts it]")
    @click.option("--hub", help="HUB, HUB:ENCODER, FOLDER or FILE.yaml." + default("hub"))
    @click.option("--method", help=f"{METHOD_HELP}." + default("method"))
    @click.option("--epochs", help="Of each phase of the method." + default("epochs"))
    @click.option("--limit", help="Training images at most.  [default: all]")
    @click.option("--image-size", help="Side of the images, in pixels." + default("image_size"))
    @click.option("--top-k", help="Encoders that an image activates.  [default: 2; of one 1]")
    @click.option("--generator", help="even, small, resnet10 or uniform." + default("generator"))
    @click.option(
        "--exploration-coef",
        help="Weight of the pathway exploration loss." + default("exploration_coef"),
    )
    @click.option("--random-init", is_flag=True, default=None, help="No pretrained weights.")
    @click.option("--swap", metavar="N", help="Encoders in memory at most; others wait in files.")
    @click.option("--batch-size", help="Images of a step." + default("batch_size"))
    @click.option("--learning-rate", help="Of all new layers." + default("learning_rate"))
    @click.option("--seed", help="Everything random follows from it." + default("seed"))
    @click.option("--device", help="auto, cpu, cuda ..." + default("device"))
    @click.option("--config", type=EXISTING, help="Complete YAML configuration.")
    @click.option("--set", "set", multiple=True, metavar="SECTION.KEY=VALUE", help=cli.SET_HELP)
    @click.option("--run-dir", type=FOLDER, help="A new folder.  [default: runs/...]")
    @click.option("--resume", type=FOLDER, metavar="RUN", help=cli.RESUME_HELP)
    def command(**options: Any) -> int:
        given = {name: value for name, value in options.items() if value not in (None, ())}
        with contextlib.ExitStack() as stack:
            stack.enter_context(_gpu_memory())
            with cli.user_errors():
                distributed.join()
                config, folder = _shared_run(task, given)
                is_leader = distributed.rank() == 0
                is_new = not (folder / CONFIG_FILE).exists()
                if not is_new and is_leader:
                    stack.enter_context(held(folder))
                if _is_complete(folder):
                    print(f"{folder} is complete")
                    return 0
                built = [_build(config, folder)]
                n_steps = epoch_steps(built[0].data, config.train.batch_size)
                check_data(folder, built[0].data, n_steps)
                if is_new and is_leader:
                    create_folder(folder, dump_config(config))
                    stack.enter_context(held(folder))
                if is_leader and not (folder / "checkpoints").exists():
                    note_data(folder, built[0].data, n_steps)
            return _train(built, config, folder)

    return command


def _shared_run(task: str, given: dict[str, Any]) -> tuple[VisionConfig, Path]:
    """The first process of several decides."""

    def decide() -> str:
        config, folder = _run(task, given)
        return json.dumps([config.model_dump_json(), str(folder)])

    config, folder = json.loads(distributed.from_leader(decide))
    return VisionConfig.model_validate_json(config), Path(folder)


def _run(task: str, given: dict[str, Any]) -> tuple[VisionConfig, Path]:
    """The configuration and the folder of a run that begins or goes on."""
    resume = given.pop("resume", None)
    if resume not in (None, cli.AUTO):
        cli.refuse_beside_resume(given)
        config = open_run(resume)
        _check_task(config, task, resume)
        return config, resume
    file = given.get("config") or BUILT_IN_CONFIGS / f"{task}.yaml"
    overrides, named = given_settings(VisionConfig, KEYS, given)
    config = _resolved(load_config(file, overrides))
    _check_task(config, task, file)
    check_method(config.method)
    _check_used(named, config.method)
    folder = cli.run_to_continue(
        given.get("run_dir"), dump_config(config), _is_complete, is_auto=resume == cli.AUTO
    )
    if folder is None:
        folder = given.get("run_dir") or _default_run_dir(config)
        check_new_run(folder)
    return config, folder


def _resolved(config: VisionConfig) -> VisionConfig:
    """
    The configuration that repeats the run from any folder, in the number format of this machine.

    :raises ValueError: if there is no such device or hub
    """
    device = check_device("train.device", config.train.device)
    dtype = resolve_precision(config.hub.precision, device)
    hub: dict[str, Any] = {
        "precision": str(dtype).removeprefix("torch."),
        "name": lasting_name(config.hub.name),
    }
    if config.hub.top_k == "auto":
        hub["top_k"] = number_activated("auto", load_cards(config.hub.name))
    root = None if config.data.root is None else str(Path(config.data.root).absolute())
    changes = {
        "hub": config.hub.model_copy(update=hub),
        "data": config.data.model_copy(update={"root": root}),
    }
    return config.model_copy(update=changes)


def _check_task(config: VisionConfig, task: str, place: Path) -> None:
    if config.task != task:
        raise ValueError(f"{place} is of {config.task}, not of {task}")


def _check_used(named: Mapping[str, str], method: str) -> None:
    """
    :param named: how the user gave each key
    :raises ValueError: if one means nothing to the method
    """
    for key, option in named.items():
        users = USED_BY.get(key)
        if users is not None and method.partition(":")[0] not in users:
            raise ValueError(
                f"{option} has no meaning with method {method!r}: leave it out; "
                f"it is for {', '.join(users)}"
            )


def _is_complete(folder: Path) -> bool:
    return (folder / RESULTS_FILE).exists()


class _Built(NamedTuple):
    method: Method
    data: Data


def _build(config: VisionConfig, folder: Path) -> _Built:
    data, task = load_data(config)
    _check_shares(config, data)
    hub = load_vision_hub(
        config.hub.name, config.data.image_size, pretrained=not config.hub.random_init
    )
    device = check_device("train.device", config.train.device)
    return _Built(build(config, hub, task, folder / SWAP_FOLDER).to(device), data)


def _check_shares(config: VisionConfig, data: Data) -> None:
    """
    :raises ValueError: if the processes can't have equal shares of a step
    """
    n, n_images, size = distributed.n_processes(), len(data.train), config.train.batch_size  # type: ignore[arg-type]
    if n > 1 and (size % n > 0 or size > n_images):
        raise ValueError(
            f"train.batch_size is {size}, but torchrun started {n} processes, which share "
            f"{n_images} images: let it be a multiple of {n}, and {n_images} at most"
        )


def _train(built: list[_Built], config: VisionConfig, folder: Path) -> int:
    """
    Train to the end or to a signal; returns the exit code.

    :param built: one, which is taken out of the list: without another reference a rollback frees it
    """
    if distributed.rank() == 0:
        note_command(folder)
        print(f"run folder: {folder}", flush=True)
    stop = StopSignal()
    try:
        with stop.caught(), cli.failures(DamagedFileError, UnreadableImageError, OSError):
            number = _learn(built, config, folder, stop)
    finally:
        shutil.rmtree(folder / SWAP_FOLDER, ignore_errors=True)
    if number is not None:
        return 128 + number
    if distributed.rank() == 0:
        print((folder / RESULTS_FILE).read_text())
    return 0


@contextlib.contextmanager
def _gpu_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise click.ClickException(
            "the GPU's memory is full: lower train.batch_size, hub.top_k or data.image_size, or "
            "give --swap"
        ) from error


def _learn(built: list[_Built], config: VisionConfig, folder: Path, stop: StopSignal) -> int | None:
    """Train to the end or to a signal, whose number is returned."""
    trainer = Trainer(*built.pop(), config, folder)
    while True:
        try:
            return trainer.run(stop)
        except NotFiniteError as error:
            what, n_rollbacks = str(error), trainer.n_rollbacks + 1
            if n_rollbacks > config.train.n_rollbacks:
                raise click.ClickException(f"{what}; {advice('train.learning_rate')}") from error
        # The error is gone by now, and with it frames that hold the model and the failed step's
        # graph: another model may have no room beside them.
        del trainer
        gc.collect()
        with cli.user_errors():
            trainer = Trainer(*_build(config, folder), config, folder, n_rollbacks)
        if distributed.rank() == 0:
            print(f"{what}: back to step {trainer.steps_done:,} at half the learning rate")


def _default_run_dir(config: VisionConfig) -> Path:
    named = load_cards(config.hub.name).name
    method, hub = (name.replace(":", "_").replace("/", "_") for name in (config.method, named))
    now = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs", f"{config.data.name}-{method}-{hub}-s{config.train.seed}-{now}")
