"""A run's data and method, built from its configuration, and with the weights that it learned."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hubrl.files import read_json
from hubrl.run_folder import config_file
from hubrl.specs import HubSpec
from hubrl.state_folder import load_parts
from vision_tasks import distributed
from vision_tasks.config import VisionConfig, load_run_config
from vision_tasks.data import Data, ImageDataset, load_classification, load_landmarks
from vision_tasks.hubs import load_vision_hub
from vision_tasks.methods import Method, Settings, build_method
from vision_tasks.swap import Swap
from vision_tasks.tasks import Classification, Landmarks, Task
from vision_tasks.training import BEST, batches_of

#: Which images a run has.
DATA_FILE = "data.json"
EPOCH_STEPS = "epoch_steps"


class LoadedRun(NamedTuple):
    """A finished run, ready to be asked."""

    config: VisionConfig
    data: Data
    method: Method


def open_run(folder: Path) -> VisionConfig:
    """
    The configuration of a run.

    :raises ValueError: if the folder is not that of a run
    """
    return load_run_config(config_file(folder))


def load_run(folder: Path) -> LoadedRun:
    """
    A run with the weights that its results are of, on the CPU.

    :raises ValueError: if it is none, its data, its hub or its checkpoint are missing, or its
        encoders were swapped
    """
    config = open_run(folder)
    if config.hub.swap is not None:
        raise ValueError(f"{folder} was trained with hub.swap, whose weights lie in other files")
    data, task = load_data(config)
    check_data(folder, data)
    hub = load_vision_hub(
        config.hub.name, config.data.image_size, pretrained=not config.hub.random_init
    )
    method = build(config, hub, task, folder)
    name = BEST if config.train.patience else "last"
    if method.begins_anew:
        method.begin(method.phases[-1], partial(batches_of, data.train, config.train.n_workers))
    load_parts({"method": method}, folder / "checkpoints" / name)
    return LoadedRun(config, data, method)


def note_data(folder: Path, data: Data, n_steps: int) -> None:
    """
    Write down which images a new run learns from, is chosen by and is tested on.

    :param n_steps: of an epoch
    """
    new = folder / f".{DATA_FILE}.new"
    new.write_text(json.dumps(_identity(data) | {EPOCH_STEPS: n_steps}, indent=1) + "\n")
    new.replace(folder / DATA_FILE)  # other processes of the run may be reading it


def check_data(folder: Path, data: Data, n_steps: int | None = None) -> None:
    """
    A run must not go on with another split: what it has learned from may be in its test.

    :param n_steps: of an epoch, if the run goes on
    :raises ValueError: if its images or targets are others than those noted, or its epochs have
        other steps; older runs noted none
    """
    file = folder / DATA_FILE
    if not file.exists():
        return
    noted, found = read_json(file), _identity(data)
    for part, now in found.items():
        if noted.get(part) != now:
            n = (noted.get(part) or {}).get("n_images")
            raise ValueError(
                f"{folder} began with other images: its {part} part is another one ({n} images "
                f"then, {now['n_images']} now); put them back as they were, or train anew"
            )
    before = noted.get(EPOCH_STEPS, n_steps)
    if n_steps is not None and before != n_steps:
        raise ValueError(
            f"{folder} began with {before} steps in an epoch, but would go on with {n_steps}: "
            "several processes leave the last images of an epoch out, one doesn't; start as many "
            "as it began with"
        )


def _identity(data: Data) -> dict[str, dict[str, Any]]:
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        name: {"n_images": len(part), "sha256": part.sha256}
        for name, part in parts.items()
        if isinstance(part, ImageDataset)
    }


def load_data(config: VisionConfig) -> tuple[Data, Task]:
    """
    The images of a run, and what is learned from them.

    :raises ValueError: if the data are unknown, missing or damaged, or if the configuration moves
        images, but not their landmarks
    """
    data = config.data
    root = Path(data.root) if data.root else None
    rest = (root, data.image_size, data.limit, config.train.seed)
    if config.task == "classification":
        images = load_classification(data.name, *rest)
        return images, Classification(images.n_outputs)
    if data.flip or data.shift:
        raise ValueError(
            "data.flip and data.shift would leave the landmarks where they were: set them to "
            "false and 0"
        )
    faces = load_landmarks(data.name, *rest)
    return faces, Landmarks(faces.n_outputs // 2, faces.eyes)


def build(config: VisionConfig, hub: HubSpec, task: Task, swap_folder: Path) -> Method:
    """
    The untrained method of a run.

    :param hub: the encoders' cards, at the size that the images have
    :param swap_folder: where encoders wait, if they are swapped
    :raises ValueError: if method, hub and swapping don't fit
    """
    settings = Settings(
        seed=config.train.seed,
        image_size=config.data.image_size,
        top_k=config.hub.top_k,
        generator=config.hub.generator,
        exploration_coef=config.hub.exploration_coef,
        exploitation_coef=config.hub.exploitation_coef,
        pretrained=not config.hub.random_init,
        precision=config.hub.precision,
        swap=_swap(config, swap_folder),
    )
    torch.manual_seed(config.train.seed)
    return build_method(config.method, hub, task, settings)


def _swap(config: VisionConfig, folder: Path) -> Swap | None:
    if config.hub.swap is None:
        return None
    if distributed.n_processes() > 1:
        raise ValueError(
            f"hub.swap is {config.hub.swap}, but torchrun started {distributed.n_processes()} "
            "processes: an encoder that is swapped out can't wait for their gradients; set "
            "hub.swap to null, or start one process"
        )
    return Swap(config.hub.swap, folder)
