"""``single:ENCODER``: one encoder of the hub, fine-tuned."""

from __future__ import annotations

from torch import Tensor

from hubrl.specs import HubSpec
from vision_tasks.methods.method import Method, Predictor, Settings
from vision_tasks.tasks import Task


class Single(Method):
    """
    One encoder with a linear head.

    :param hub: of this one encoder
    """

    def __init__(self, hub: HubSpec, task: Task, settings: Settings) -> None:
        super().__init__(hub, task, settings)
        (spec,) = hub.encoders
        self.model = Predictor(hub, spec, task, settings)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Outputs (B, O)."""
        outputs_BO: Tensor = self.model(images_BCHW)
        return outputs_BO
