"""Parameters and floating point operations, counted from shapes alone, as Hub-Pathway counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from hubrl.aggregation import Contribution
from hubrl.pathway import HubPathway
from hubrl.specs import HubSpec
from vision_tasks.costed import ENSEMBLE, PATHWAY, SINGLE, Setup, build_model
from vision_tasks.methods.ensembles import EnsembleJ
from vision_tasks.methods.hub_pathway import HubPathwayMethod
from vision_tasks.methods.method import Predictor


class Cost(NamedTuple):
    """What one model costs, wherever it runs."""

    parameters: int
    """Weights, those that only training needs included."""
    flops: int
    """Of inference, for one image; see ``count_flops``."""


def count_costs(hub: HubSpec, setup: Setup) -> dict[str, Cost]:
    """
    Costs of the single model, of all together, and of the pathway.

    Where encoders differ, the pathway's FLOPs are the mean over images that activate all of them
    equally often.

    :raises ValueError: if the setup doesn't fit the hub
    """
    ensemble, pathway = (build_model(hub, setup, name, "meta") for name in (ENSEMBLE, PATHWAY))
    assert isinstance(ensemble, EnsembleJ)
    assert isinstance(pathway, HubPathwayMethod)
    images_BCHW = torch.zeros(
        1, 3, setup.image_size, setup.image_size, dtype=torch.uint8, device="meta"
    )
    predictors = list(ensemble.predictors().values())
    flops = [_predictor_flops(predictor, images_BCHW) for predictor in predictors]
    return {
        SINGLE: Cost(count_parameters(predictors[0]), flops[0]),
        ENSEMBLE: Cost(count_parameters(ensemble), sum(flops)),
        PATHWAY: Cost(
            count_parameters(pathway), _pathway_flops(pathway.model.pathway, flops, setup)
        ),
    }


def count_parameters(module: nn.Module) -> int:
    """Numbers in all weights; statistics of normalisation are none."""
    return sum(weight.numel() for weight in module.parameters())


def count_flops(run: Callable[[], Any]) -> int:
    """
    Floating point operations as the supplement of Hub-Pathway (arXiv 2206.03726) has them.

    One for each multiplication and addition of a convolution, a linear layer or attention, and two
    for each output of ``BatchNorm``. Which that are is derived from its figures, not said in it.

    :param run: a forward pass with gradients enabled, on the ``meta`` device: elsewhere networks
        take shortcuts that torch doesn't count
    """
    n_normalised = 0

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal n_normalised
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            n_normalised += output.numel()

    hook = register_module_forward_hook(note)
    with FlopCounterMode(display=False) as counter:
        run()
    hook.remove()
    # torch counts each multiplication and addition as two.
    n_flops: int = counter.get_total_flops()
    return n_flops // 2 + 2 * n_normalised


def _predictor_flops(predictor: Predictor, images_BCHW: Tensor) -> int:
    encoder, head = predictor.encoder, predictor.head
    # Not the encoder itself: autocast knows no meta device.
    return count_flops(lambda: head(encoder.trunk(encoder.preprocess(images_BCHW))))


def _pathway_flops(pathway: HubPathway, predictor_flops: list[int], setup: Setup) -> int:
    """
    Of the generator without its noise, and of the encoders, heads and blocks that an image meets.

    :param predictor_flops: of each encoder and its head
    """
    generator = pathway.generator.to_empty(device="cpu").eval()  # autocast knows no meta device
    image = torch.zeros(1, 3, setup.image_size, setup.image_size)
    flops = float(count_flops(lambda: generator(image, None)))
    n_always = len(pathway.always_active)
    share = (pathway.top_k - n_always) / (len(predictor_flops) - n_always)
    for i, name in enumerate(pathway.hub.encoder_names):
        met = predictor_flops[i] + _block_flops(pathway, i, setup)
        flops += met * (1.0 if name in pathway.always_active else share)
    return round(flops)


def _block_flops(pathway: HubPathway, i: int, setup: Setup) -> int:
    with torch.device("meta"):
        part = Contribution(i, torch.zeros(1, dtype=torch.int64), torch.zeros(1, setup.n_outputs))
        weights_BE = torch.zeros(1, len(pathway.encoders))
        return count_flops(lambda: pathway.aggregator([part], weights_BE))
