"""What is learned: classes or landmarks; losses of each image, scores, how models are combined."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vision_tasks.metrics import (
    accuracy,
    area_under_error_curve,
    failure_rate,
    normalised_mean_error,
)

# Shape letters: B batch, O outputs, C classes, P points, M models.


class Task(Protocol):
    """What a method has to know of a task; ``targets_B`` are whatever its data give."""

    @property
    def n_outputs(self) -> int:
        """Outputs of a model, O."""

    @property
    def output_start(self) -> float:
        """What an untrained head gives: its bias."""

    @property
    def metric(self) -> str:
        """The score that models are chosen by, on validation images."""

    @property
    def is_more_better(self) -> bool:
        """Whether a higher score is a better one."""

    def losses(self, outputs_BO: Tensor, targets_B: Tensor) -> Tensor:
        """Loss of each image, (B,)."""

    def imitation_losses(self, outputs_BO: Tensor, teachers_BO: Tensor) -> Tensor:
        """Distance of each image's outputs from a teacher's, (B,); the teacher has no gradient."""

    def combine(self, outputs_MBO: Tensor) -> Tensor:
        """The common output of several models, (B, O)."""

    def scores(self, outputs_BO: Tensor, targets_B: Tensor) -> dict[str, float]:
        """All scores of a set of images, ``metric`` and ``loss`` among them."""


@dataclasses.dataclass(frozen=True)
class Classification:
    """
    Classes; outputs are logits.

    :param n_outputs: number of classes
    """

    n_outputs: int
    output_start: float = 0.0
    metric: str = "accuracy"
    is_more_better: bool = True

    #: Of distillation (Hinton et al. 2015, arXiv 1503.02531).
    TEMPERATURE = 4.0

    def losses(self, outputs_BC: Tensor, targets_B: Tensor) -> Tensor:
        """Cross entropy of each image, (B,), in nats."""
        return F.cross_entropy(outputs_BC, targets_B, reduction="none")

    def imitation_losses(self, outputs_BC: Tensor, teachers_BC: Tensor) -> Tensor:
        """
        Kullback-Leibler divergence from the teacher's softened probabilities, (B,).

        It is multiplied by the square of the temperature, which keeps gradients as large as those
        of the cross entropy.
        """
        t = self.TEMPERATURE
        teachers_BC = (teachers_BC.detach() / t).log_softmax(dim=1)
        students_BC = (outputs_BC / t).log_softmax(dim=1)
        divergences_BC = F.kl_div(students_BC, teachers_BC, reduction="none", log_target=True)
        return divergences_BC.sum(dim=1) * t * t

    def combine(self, outputs_MBC: Tensor) -> Tensor:
        """Logarithm of the mean of the models' probabilities."""
        log_probabilities_MBC = outputs_MBC.log_softmax(dim=2)
        return log_probabilities_MBC.logsumexp(dim=0) - torch.tensor(float(len(outputs_MBC))).log()

    def scores(self, outputs_BC: Tensor, targets_B: Tensor) -> dict[str, float]:
        """``accuracy``, 0..1, and ``loss``."""
        loss = float(self.losses(outputs_BC, targets_B).mean())
        return {"accuracy": accuracy(outputs_BC, targets_B), "loss": loss}


@dataclasses.dataclass(frozen=True)
class Landmarks:
    """
    Points in an image; outputs are x and y of each, 0..1 of the image's sides.

    :param n_points: of a face, P
    :param eyes: indices of the points whose means are the two eyes of the inter-ocular distance
    """

    n_points: int
    eyes: tuple[Sequence[int], Sequence[int]]
    output_start: float = 0.5
    metric: str = "nme"
    is_more_better: bool = False

    @property
    def n_outputs(self) -> int:
        """Two for each point."""
        return 2 * self.n_points

    def losses(self, outputs_BO: Tensor, targets_BP2: Tensor) -> Tensor:
        """Mean absolute error of each image, (B,), in hundredths of the image's side."""
        return 100.0 * (outputs_BO - targets_BP2.flatten(1)).abs().mean(dim=1)

    def imitation_losses(self, outputs_BO: Tensor, teachers_BO: Tensor) -> Tensor:
        """Mean absolute distance from the teacher's points, (B,), in the same unit."""
        return 100.0 * (outputs_BO - teachers_BO.detach()).abs().mean(dim=1)

    def combine(self, outputs_MBO: Tensor) -> Tensor:
        """Mean point of the models."""
        return outputs_MBO.mean(dim=0)

    def scores(self, outputs_BO: Tensor, targets_BP2: Tensor) -> dict[str, float]:
        """
        ``nme``: mean error over the inter-ocular distance; ``failure_rate``: the share of images
        above 10 %; ``auc``: area under the curve of errors up to 10 %; and ``loss``.
        """
        points_BP2 = outputs_BO.reshape(targets_BP2.shape)
        errors_B = normalised_mean_error(points_BP2, targets_BP2, self.eyes)
        return {
            "nme": float(errors_B.mean()),
            "failure_rate": failure_rate(errors_B),
            "auc": area_under_error_curve(errors_B),
            "loss": float(self.losses(outputs_BO, targets_BP2).mean()),
        }
