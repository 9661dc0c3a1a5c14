"""``uniform``: all encoders run and weigh the same."""

from __future__ import annotations

import dataclasses

from hubrl.sections import Schedule
from hubrl.specs import HubSpec
from vision_tasks.methods.hub_pathway import HubPathwayMethod
from vision_tasks.methods.method import Settings
from vision_tasks.tasks import Task


class Uniform(HubPathwayMethod):
    """
    ``hub-pathway`` without pathways: its heads, aggregation and exploitation loss, fixed weights.

    What choosing encoders for each image is worth, apart from the rest of the method. The
    exploration loss is a constant here, and not counted.
    """

    def __init__(self, hub: HubSpec, task: Task, settings: Settings) -> None:
        settings = settings._replace(
            generator="uniform",
            top_k=len(hub.encoders),
            exploration_coef=Schedule.constant(0.0),
        )
        # Always active encoders would weigh more than the others.
        super().__init__(dataclasses.replace(hub, always_active=()), task, settings)
