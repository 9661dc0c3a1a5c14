"""Hubs at the size of a task's images."""

from __future__ import annotations

import dataclasses

from hubrl.encoders import with_features_dim
from hubrl.specs import HubSpec, load_hub


def load_vision_hub(name: str, image_size: int) -> HubSpec:
    """The hub's cards, each at this size."""
    hub = load_hub(name)
    size = (image_size, image_size)
    encoders = tuple(
        with_features_dim(dataclasses.replace(spec, image_size=size, golden=None))
        for spec in hub.encoders
    )
    return dataclasses.replace(hub, encoders=encoders)
