"""All commands, stopped where their work would begin: nothing is trained, fetched or measured."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn
from unittest import mock

import click
import huggingface_hub.constants
import matplotlib.pyplot  # noqa: F401 (its first import makes folders)
from fuzz import valid
from small_images import quadrant_data

import vision_tasks.classification
import vision_tasks.complexity
import vision_tasks.landmarks
import vision_tasks.pretrain
import vision_tasks.report
import vision_tasks.swap_memory
from hubrl import bench
from hubrl.__main__ import group
from hubrl.specs import HUB_FILE

#: Program -> its command.
COMMANDS: dict[str, click.Command] = {
    "hubrl": group,
    "classification": vision_tasks.classification.command,
    "landmarks": vision_tasks.landmarks.command,
    "complexity": vision_tasks.complexity.command,
    "pretrain": vision_tasks.pretrain.command,
    "report": vision_tasks.report.command,
    "swap_memory": vision_tasks.swap_memory.command,
}
#: Where work begins: games, images, agents, measurements, downloads that a hub's name stands for.
WORK = (
    "hubrl.train.make_env",
    "hubrl.evaluate.make_env",
    "hubrl.evaluate.make_vec_env",
    "hubrl.export._export_onnx",
    "hubrl.export._export_distilled",
    "hubrl.pretrain._agent",
    "hubrl.pretrain._self_supervised",
    "hubrl.study._check",
    "hubrl.study._collect",
    "hubrl.study._train",
    "hubrl.bench.machine",
    "envs.make_vec_env",
    "hubrl.fetching.recipes._fetch",
    "vision_tasks.command.load_data",
    "vision_tasks.command.build",
    "vision_tasks.pretrain.load_classification",
    "vision_tasks.complexity.count_costs",
    "vision_tasks.swap_memory.save_random_weights",
)
NETWORK = re.compile("from-(hf|timm|torchvision)|pull|push|fetch")


class WorkBeginsError(Exception):
    """A command accepted its arguments."""


def harmless(word: str) -> str:
    """The word, but naming no place outside the working folder: users may write there."""
    word = word.replace("..", "_").replace("~", "_")
    return re.sub(r"(^|=)/+", r"\1", word)


def asks_for_network(arguments: Sequence[str]) -> bool:
    """Whether one says so, as every use of the network must."""
    return any(NETWORK.search(argument) for argument in arguments)


def files() -> dict[str, bytes]:
    """What arguments may name: a hub, a run, configurations, a study, an agent, a weight file."""
    weights = {f"my_hub/{name}": data for name, data in valid.weight_files().items()}
    return weights | {
        f"my_hub/{HUB_FILE}": valid.hub_cards()[0],
        "run/config.yaml": valid.ppo_config(),
        "run/checkpoints/last/state.json": b'{"num_timesteps": 64}',
        "agent.yaml": valid.agent_configs()[-1],
        "images.yaml": valid.image_configs()[0],
        "ppo.yaml": valid.ppo_config(),
        "study.yaml": valid.studies()[0],
        "agent.zip": valid.agent_zip(valid.agent_zips()[3]),
        "a.safetensors": valid.weight_files()["a.safetensors"],
    }


@contextlib.contextmanager
def without_work() -> Iterator[None]:
    """Inside, commands raise ``WorkBeginsError`` where their work would begin."""
    benches = tuple(b._replace(measure=_begin) for b in bench.BENCHES)
    with contextlib.ExitStack() as stack:
        for name in WORK:
            stack.enter_context(mock.patch(name, _begin))
        stack.enter_context(mock.patch.object(bench, "BENCHES", benches))
        stack.enter_context(mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
        yield


@contextlib.contextmanager
def without_pictures() -> Iterator[None]:
    """Inside, image tasks have small images of their own, and reports draw nothing."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch("vision_tasks.runs.load_classification", return_value=quadrant_data()))
        for name in ("draw_scores", "draw_curves", "draw_exploration", "draw_routing"):
            enter(mock.patch(f"vision_tasks.report.{name}"))
        yield


def _begin(*_: Any, **__: Any) -> NoReturn:
    raise WorkBeginsError
