"""``ensemble-i`` and ``ensemble-j``: all encoders of the hub, fine-tuned alone or together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hubrl.specs import HubSpec
from vision_tasks.methods.method import Losses, Method, Predictor, Settings
from vision_tasks.tasks import Task

# Shape letters: B batch, O outputs, M models, C H W image.


class Ensemble(Method):
    """A model for each encoder."""

    def __init__(self, hub: HubSpec, task: Task, settings: Settings) -> None:
        super().__init__(hub, task, settings)
        models = {spec.name: Predictor(hub, spec, task, settings) for spec in hub.encoders}
        self.models = nn.ModuleDict(models)

    def predictors(self) -> dict[str, Predictor]:
        """The models, by their encoders' names."""
        models = self.models.items()
        return {name: model for name, model in models if isinstance(model, Predictor)}

    def outputs(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Outputs (B, O) of each model."""
        return {name: model(images_BCHW) for name, model in self.models.items()}


class EnsembleI(Ensemble):
    """
    Each encoder is fine-tuned alone; their predictions are averaged at test.

    Their losses are added, which changes no model's gradient: after it each model is what
    ``single:ENCODER`` gives with the same seed, as long as training doesn't stop early, which they
    do together. So their results count, too.
    """

    def loss(self, images_BCHW: Tensor, targets_B: Tensor) -> Losses:
        """Sum of the models' losses; the part ``task`` is their mean."""
        outputs = self.outputs(images_BCHW).values()
        losses_M = torch.stack([self.task.losses(each, targets_B).mean() for each in outputs])
        return Losses(losses_M.sum(), {"task": losses_M.mean()})

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Combined outputs (B, O)."""
        return self.task.combine(torch.stack(list(self.outputs(images_BCHW).values())))

    def results(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """The ensemble's outputs, and those of each encoder's model."""
        outputs = self.outputs(images_BCHW)
        return {"": self.task.combine(torch.stack(list(outputs.values()))), **outputs}


class EnsembleJ(Ensemble):
    """All encoders are fine-tuned together, by the loss of their mean output."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Mean of the models' outputs, (B, O)."""
        return torch.stack(list(self.outputs(images_BCHW).values())).mean(dim=0)
