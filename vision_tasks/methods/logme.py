"""``logme``: the encoder that LogME ranks first, fine-tuned."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vision_tasks.distributed import agreed
from vision_tasks.logme import logme, regression_targets
from vision_tasks.methods.ensembles import Ensemble
from vision_tasks.methods.method import Batches, Predictor
from vision_tasks.tasks import Task

# Shape letters: B batch, N images, D features, O outputs, C H W image.


class LogMe(Ensemble):
    """
    Ranks the hub by LogME (You et al., ICML 2021, arXiv 2102.11005), fine-tunes the first alone.

    Its result has the encoder's name, too.
    """

    begins_anew = True

    def begin(self, phase: str, batches: Batches) -> None:
        """Rank the encoders on the training images, keep the first and drop the others."""
        scores = logme_scores(self.predictors().items(), self.task, batches)
        best = max(scores, key=lambda name: scores[name])
        for name in scores.keys() - {best}:
            del self.models[name]

    @property
    def chosen(self) -> tuple[str, Predictor]:
        """Name and model of the encoder that is fine-tuned."""
        ((name, model),) = self.predictors().items()
        return name, model

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Outputs (B, O)."""
        outputs_BO: Tensor = self.chosen[1](images_BCHW)
        return outputs_BO

    def results(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """The outputs, once more under the encoder's name."""
        outputs_BO = self(images_BCHW)
        return {"": outputs_BO, self.chosen[0]: outputs_BO}


@torch.no_grad()
def logme_scores(
    models: Iterable[tuple[str, Predictor]], task: Task, batches: Batches
) -> dict[str, float]:
    """
    LogME of each encoder's features, in nats for each image.

    :param models: names and encoders as they were pretrained, one after the other
    :param task: gives the number of outputs
    :param batches: training images
    """
    scores = {}
    for name, model in models:
        pairs = [(model.features(images).cpu(), targets.cpu()) for images, targets in batches()]
        features_ND, targets_N = (torch.cat(part) for part in zip(*pairs, strict=True))
        scores[name] = logme(features_ND, regression_targets(targets_N, task.n_outputs))
    return agreed(scores)
