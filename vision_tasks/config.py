"""The configuration of an image task's run: typed sections, read from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from hubrl.plain_yaml import dump_yaml
from hubrl.sections import (
    Count,
    Fraction,
    Integer,
    NonNegative,
    Positive,
    Schedule,
    Section,
    parse,
    read_mapping,
    with_later_keys,
    with_overrides,
)

#: Complete configurations that ship with hubrl, one for each command.
BUILT_IN_CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "vision"
#: Keys that came later, by section, and what runs did before.
LATER_KEYS: Mapping[str, Mapping[str, Any]] = {"hub": {"swap": None}, "train": {"n_rollbacks": 0}}


class DataSection(Section):
    """
    What is learned from.

    :param name: of a data set
    :param root: its folder; None: where the package that carries it puts it
    :param image_size: side of the square images, in pixels
    :param limit: training images at most, as many of each class; None: all
    :param flip: half of the training images are mirrored
    :param shift: training images are moved by up to so many pixels, borders repeated
    """

    name: str
    root: str | None
    image_size: Count
    limit: Count | None
    flip: bool
    shift: Annotated[Integer, Field(ge=0)]


class HubSection(Section):
    """
    The pretrained encoders and their pathway.

    :param name: a hub, ``HUB:ENCODER``, a folder or a YAML file
    :param top_k: encoders that an image activates; ``auto``: 2, or 1 of a hub of one
    :param generator: a key of ``hubrl.generators.GENERATORS``
    :param exploration_coef: weight of the pathway exploration loss, which may change over a phase
    :param exploitation_coef: weight of the exploitation loss
    :param random_init: random weights in the place of the pretrained ones
    :param precision: what the encoders compute in
    :param swap: encoders in memory at most, while the others wait in files; None: all
    """

    name: str
    top_k: Count | Literal["auto"]
    generator: str
    exploration_coef: Schedule
    exploitation_coef: NonNegative
    random_init: bool
    precision: Literal["auto", "float32", "bfloat16"]
    swap: Count | None


class TrainSection(Section):
    """
    How it is learned: AdamW, with a learning rate that warms up and falls as a cosine to 0.

    :param epochs: of each phase
    :param batch_size: images of a step, of all processes together
    :param learning_rate: of all new layers
    :param encoder_lr_scale: learning rate of the encoders, as a share of it
    :param weight_decay: of all weights with more than one dimension
    :param warmup: share of the steps in which the learning rate rises
    :param patience: epochs without a better validation score after which a phase ends, and the
        best weights are taken; 0: all epochs, and the last weights
    :param save_freq: steps between checkpoints; 0: at the end of each epoch
    :param n_rollbacks: how often a run with a loss, a gradient or a weight that is no finite number
        goes back to its last checkpoint and on with half the learning rate; 0: it stops
    :param n_workers: processes that read images
    :param seed: everything random follows from it
    :param device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
    """

    epochs: Count
    batch_size: Count
    learning_rate: Positive
    encoder_lr_scale: NonNegative
    weight_decay: NonNegative
    warmup: Fraction
    patience: Annotated[Integer, Field(ge=0)]
    save_freq: Annotated[Integer, Field(ge=0)]
    n_rollbacks: Annotated[Integer, Field(ge=0, le=1000)]
    n_workers: Annotated[Integer, Field(ge=0)]
    seed: Annotated[Integer, Field(ge=0, lt=2**31)]
    device: str


class VisionConfig(Section):
    """All settings of a run, by owner."""

    task: Literal["classification", "landmarks"]
    method: str
    data: DataSection
    hub: HubSection
    train: TrainSection


def load_config(file: Path, overrides: Mapping[str, Any] | None = None) -> VisionConfig:
    """
    Read a complete configuration.

    :param file: YAML
    :param overrides: values by key path, such as ``{"train.seed": 3}``; they win over the file
    :raises ValueError: if the file can't be read, or a key or a value is wrong; one line
    """
    overrides = dict(overrides or {})
    data = read_mapping(file)
    if "method" in overrides:
        data["method"] = overrides.pop("method")
    return parse(VisionConfig, with_overrides(data, overrides))


def load_run_config(file: Path) -> VisionConfig:
    """
    The configuration of a run, which may be older than some keys.

    :raises ValueError: as ``load_config``
    """
    return parse(VisionConfig, with_later_keys(read_mapping(file), LATER_KEYS))


def dump_config(config: VisionConfig) -> str:
    """YAML that ``load_config`` reads back to an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))
