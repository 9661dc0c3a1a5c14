"""Which encoders the images of each class activate, in a finished run of hub-pathway."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vision_tasks.data import ImageData
from vision_tasks.methods.hub_pathway import HubPathwayMethod
from vision_tasks.runs import load_run
from vision_tasks.training import batches_of

# Shape letters: C classes, E encoders, K top k, H W image.


class Routing(NamedTuple):
    """What ``draw_routing`` shows."""

    usage_CE: NDArray[np.float64]
    """Share of a class' validation images that activate an encoder; rows sum to top_k."""
    classes: tuple[str, ...]
    encoders: tuple[str, ...]
    examples: list[NDArray[np.uint8]]
    """The first validation image of each class, (H, W, 3)."""


@torch.no_grad()
def routing(folder: Path) -> Routing:
    """
    Route the validation images of a run.

    :param folder: of a finished run of hub-pathway on labelled images
    :raises ValueError: as ``load_run`` does
    """
    run = load_run(folder)
    assert isinstance(run.method, HubPathwayMethod)
    assert isinstance(run.data, ImageData)
    pathway, names = run.method.model.pathway.eval(), run.data.names
    usage_CE = torch.zeros(len(names), len(pathway.encoders), dtype=torch.float64)
    examples: dict[int, NDArray[np.uint8]] = {}
    for images_BCHW, targets_B in batches_of(run.data.validation, 0):
        activated_BK = run.method.model.route(images_BCHW)[0].activated
        ones_BK = torch.ones_like(activated_BK, dtype=torch.float64)
        activated_BE = torch.zeros(len(targets_B), len(pathway.encoders), dtype=torch.float64)
        usage_CE.index_add_(0, targets_B, activated_BE.scatter(1, activated_BK, ones_BK))
        for image_CHW, target in zip(images_BCHW, targets_B.tolist(), strict=True):
            examples.setdefault(target, image_CHW.permute(1, 2, 0).numpy())
    present = sorted(examples)
    counts_C1 = usage_CE.sum(dim=1, keepdim=True) / pathway.top_k
    shares_CE = (usage_CE / counts_C1.clamp(min=1))[present]
    return Routing(
        shares_CE.numpy(),
        tuple(names[c] for c in present),
        pathway.hub.encoder_names,
        [examples[c] for c in present],
    )
