"""``hub-pathway``: each image activates the encoders that its pathway weights choose."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hubrl.aggregation import Contribution
from hubrl.generators import RunningMean
from hubrl.losses import pathway_exploration_loss
from hubrl.pathway import HubPathway, PathwayOutput
from hubrl.specs import HubSpec
from vision_tasks.distributed import mean_over_processes
from vision_tasks.methods.method import (
    Batches,
    Losses,
    Method,
    Settings,
    build_aggregator,
    build_head,
)
from vision_tasks.swap import SwappedEncoders
from vision_tasks.tasks import Task

# Shape letters: B batch, E encoders, O outputs, D features of one encoder, C H W image,
# R rows of the batch that activate one encoder.


class HubPathwayMethod(Method):
    """
    Hub-Pathway (Shu et al., NeurIPS 2022, arXiv 2206.03726) with its three losses.

    ``y = A(concat_i [w_i * h_i(f_i(x))])`` over the activated encoders, with a head ``h_i`` for
    each. The task's loss of ``y``, the exploration loss, and the exploitation loss: the mean over
    images of the sum of the losses of each activated encoder's own output. Ours: ``A`` starts as
    the weighted sum, so that an untrained one doesn't scramble what the heads say.
    """

    can_swap = True

    def __init__(self, hub: HubSpec, task: Task, settings: Settings) -> None:
        super().__init__(hub, task, settings)
        self.model = HubPathwayModel(hub, task, settings)

    def begin(self, phase: str, batches: Batches) -> None:
        """Let the generator know the mean image and its features' statistics."""
        settle_generator(self.model.pathway, batches)

    def loss(self, images_BCHW: Tensor, targets_B: Tensor) -> Losses:
        """Task + exploration_coef x exploration + exploitation_coef x exploitation."""
        output, activated = self.model.route(images_BCHW)
        task = self.task.losses(output.features, targets_B).mean()
        exploitation = torch.stack(
            [self.task.losses(part.features_RD, targets_B[part.rows_R]).sum() for part in activated]
        ).sum() / len(targets_B)
        mean_1E = mean_over_processes(output.probabilities.mean(dim=0, keepdim=True))
        exploration = pathway_exploration_loss(mean_1E)
        total = (
            task
            + self._exploration_coef * exploration
            + self.settings.exploitation_coef * exploitation
        )
        parts = {"task": task, "exploration": exploration, "exploitation": exploitation}
        shares = zip(self.hub.encoder_names, mean_1E[0], strict=True)
        return Losses(total, parts | {f"probability/{name}": share for name, share in shares})

    @property
    def _exploration_coef(self) -> float:
        return self.settings.exploration_coef(1.0 - self.progress)

    def advice(self, losses: dict[str, float]) -> str | None:
        """A collapse: nearly all of an epoch's pathway probability belonged to one encoder."""
        shares = {name: losses[f"probability/{name}"] for name in self.hub.encoder_names}
        top = self.model.pathway.collapsed_to(shares)
        if top is None:
            return None
        coef = self._exploration_coef
        return (
            f"pathway collapse: encoder {top!r} has {shares[top]:.0%} of the pathway probability; "
            f"raise hub.exploration_coef (now {coef:g}), or train the encoder alone, which is "
            f"cheaper: --method single:{top}"
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Outputs (B, O), without noise in evaluation mode."""
        return self.model.route(images_BCHW)[0].features


class HubPathwayModel(nn.Module):
    """
    A pathway over the heads' outputs instead of the encoders' features.

    :param hub: the encoders' cards
    :param task: gives the outputs
    :param settings: seed of the heads, top_k, generator, weights and precision of the encoders
    """

    def __init__(self, hub: HubSpec, task: Task, settings: Settings) -> None:
        super().__init__()
        swap = settings.swap
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.pathway = OutputPathway(
                hub,
                settings.top_k,
                generator=settings.generator,
                image_shape=(3, settings.image_size, settings.image_size),
                aggregation=build_aggregator(hub, task),
                pretrained=settings.pretrained,
                precision=settings.precision,
                build_encoders=functools.partial(SwappedEncoders, swap=swap) if swap else None,
            )
        heads = {spec.name: build_head(spec, task, settings.seed) for spec in hub.encoders}
        self.heads = nn.ModuleDict(heads)

    def route(self, images_BCHW: Tensor) -> tuple[PathwayOutput, list[Contribution]]:
        """
        Route the images; ``features`` are the outputs (B, O), and the contributions have those of
        each activated encoder's head, (R, O).
        """
        contributions: list[Contribution] = []
        heads = list(self.heads.values())

        def encode(i: int, rows_R: Tensor) -> Tensor:
            some = [self.pathway.encode(i, images_BCHW, rows) for rows in self._pieces(rows_R, n)]
            outputs_RO: Tensor = heads[i](torch.cat(some).float())
            contributions.append(Contribution(i, rows_R, outputs_RO))
            return outputs_RO

        n = len(images_BCHW)
        return self.pathway(images_BCHW, encode=encode), contributions

    def _pieces(self, rows_R: Tensor, n_images: int) -> Sequence[Tensor]:
        """
        An encoder's rows: all at once in training; else as many as its share of the batch, so that
        memory is the same however the images are routed.
        """
        if torch.is_grad_enabled():
            return (rows_R,)
        share = math.ceil(n_images * self.pathway.top_k / len(self.pathway.encoders))
        return torch.split(rows_R, share)


class OutputPathway(HubPathway):
    """
    A pathway over outputs, which must keep their scale: one encoder alone weighs 1.

    Its weight in features is its probability, or the task would not teach the generator. Here that
    is divided by its value, which leaves the gradient of its logarithm.
    """

    def _weights(self, probabilities_BE: Tensor, activated_BK: Tensor) -> Tensor:
        weights_BE = super()._weights(probabilities_BE, activated_BK)
        return weights_BE / weights_BE.sum(dim=1, keepdim=True).detach()


def settle_generator(pathway: HubPathway, batches: Batches) -> None:
    """
    Show a generator the images before the first step.

    Its running means count from when training mode is left; those of features can be taken once the
    mean image is known, so it sees them twice. One without running means needs no look.
    """
    if not any(isinstance(module, RunningMean) for module in pathway.generator.modules()):
        return
    for _ in range(2):
        pathway.train()
        for images_BCHW, _ in batches():
            pathway.generator(images_BCHW, None)
        pathway.eval()
