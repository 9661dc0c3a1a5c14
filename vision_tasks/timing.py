"""Samples per second at a batch, seconds at a single image, and whether they grow with the hub."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from hubrl.benches.measuring import Measure, interleave, timed
from hubrl.specs import HubSpec
from vision_tasks.costed import (
    ENSEMBLE,
    GENERATOR,
    MODELS,
    PATHWAY,
    SINGLE,
    Setup,
    build_model,
    predict,
    random_batch,
    spread_routing,
    train_step,
)
from vision_tasks.methods import Method
from vision_tasks.methods.hub_pathway import HubPathwayMethod

ROUNDS = 7


class Speed(NamedTuple):
    """Medians; all models were measured in turns."""

    inference: dict[str, float]
    """Seconds of a batch, by model."""
    training: dict[str, float]
    """Seconds of a forward and backward pass of a batch, by model; the optimizer apart."""
    single_image: dict[str, float]
    """Seconds of inference for one image; ``generator`` is a part of the pathway's."""


def measure_speed(hub: HubSpec, setup: Setup, rounds: int = ROUNDS) -> Speed:
    """
    Time all models on random images, in float32.

    The pathway chooses at random for each image, as in ``SpreadGenerator``.

    :param hub: as ``costed_hub`` gives it
    :param rounds: measurements of each model
    :raises ValueError: if the setup doesn't fit the hub
    """
    methods = {name: spread_routing(build_model(hub, setup, name)) for name in MODELS}
    return Speed(
        inference=interleave(_inference(methods, setup), rounds, warm_up=1),
        training=interleave(_training(methods, setup), rounds, warm_up=1),
        single_image=interleave(_single_image(methods, setup), 3 * rounds, warm_up=2),
    )


def _inference(methods: dict[str, Method], setup: Setup) -> dict[str, Measure]:
    images_BCHW, _ = random_batch(setup)
    return {name: timed(partial(predict, method, images_BCHW)) for name, method in methods.items()}


def _training(methods: dict[str, Method], setup: Setup) -> dict[str, Measure]:
    images_BCHW, targets_B = random_batch(setup)
    return {
        name: timed(partial(train_step, method, images_BCHW, targets_B))
        for name, method in methods.items()
    }


def _single_image(methods: dict[str, Method], setup: Setup) -> dict[str, Measure]:
    images_BCHW, _ = random_batch(setup, n_images=1)
    sides = {
        name: timed(partial(predict, methods[name], images_BCHW))
        for name in (SINGLE, ENSEMBLE, PATHWAY)
    }
    pathway = methods[PATHWAY]
    assert isinstance(pathway, HubPathwayMethod)
    generator = pathway.model.pathway.generator

    def generate() -> None:
        with torch.no_grad():
            generator.eval()(images_BCHW, None)

    return {**sides, GENERATOR: timed(generate)}
