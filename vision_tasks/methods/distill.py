"""``distill``: one encoder learns from all others, which are fine-tuned before."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from hubrl.specs import HubSpec
from vision_tasks.methods.ensembles import EnsembleI
from vision_tasks.methods.logme import logme_scores
from vision_tasks.methods.method import Batches, Losses, Predictor, Settings
from vision_tasks.tasks import Task

# Shape letters: B batch, O outputs, C H W image.


class Distill(EnsembleI):
    """
    Distillation of an ensemble (Hinton et al. 2015, arXiv 1503.02531) into one encoder of the hub.

    Phase ``teachers`` is ``ensemble-i``. In phase ``student`` the encoder that LogME ranks first
    starts anew from its pretrained weights, and learns the task's loss plus the distance from the
    teachers' common output, each with coefficient 1. Its result is also at ``student:ENCODER``.
    """

    phases: ClassVar[tuple[str, ...]] = ("teachers", "student")
    begins_anew = True

    def __init__(self, hub: HubSpec, task: Task, settings: Settings) -> None:
        super().__init__(hub, task, settings)
        self.student: Predictor | None = None
        self._student_name = ""

    def begin(self, phase: str, batches: Batches) -> None:
        """For the student: choose it by the training images, and let the teachers rest."""
        if phase == "student":
            self._student_name = self._choose(batches)
            self.student = self._pretrained(self._student_name)
            self.models.requires_grad_(False)

    def loss(self, images_BCHW: Tensor, targets_B: Tensor) -> Losses:
        """Of the teachers as in ``ensemble-i``; of the student the task's loss and imitation."""
        if self.student is None:
            return super().loss(images_BCHW, targets_B)
        with torch.no_grad():
            teachers_BO = super().forward(images_BCHW)
        outputs_BO = self.student(images_BCHW)
        task = self.task.losses(outputs_BO, targets_B).mean()
        imitation = self.task.imitation_losses(outputs_BO, teachers_BO).mean()
        return Losses(task + imitation, {"task": task, "imitation": imitation})

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Outputs (B, O) of the student, before it begins those of the teachers."""
        if self.student is None:
            return super().forward(images_BCHW)
        outputs_BO: Tensor = self.student(images_BCHW)
        return outputs_BO

    def results(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """The student's outputs, once more under its name; before it begins, the teachers'."""
        if self.student is None:
            return super().results(images_BCHW)
        outputs_BO = self(images_BCHW)
        return {"": outputs_BO, f"student:{self._student_name}": outputs_BO}

    def _choose(self, batches: Batches) -> str:
        # Built anew, since the teachers' encoders are no longer as they were pretrained.
        names = self.hub.encoder_names
        models = ((name, self._pretrained(name)) for name in names)
        scores = logme_scores(models, self.task, batches)
        return max(names, key=lambda name: scores[name])

    def _pretrained(self, name: str) -> Predictor:
        spec = self.hub.encoders[self.hub.encoder_names.index(name)]
        device = next(self.models.parameters()).device
        return Predictor(self.hub, spec, self.task, self.settings).to(device)
