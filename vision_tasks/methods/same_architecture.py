"""For methods that combine weights layer by layer: hubs of one architecture alone."""

from __future__ import annotations

from hubrl.specs import HubSpec

#: What encoders must have in common for their weights to mean the same.
COMMON = (
    "architecture", "features_dim", "image_size", "channels", "mean", "std", "frames", "n_frames",
)  # fmt: skip


def check_same_architecture(method: str, hub: HubSpec) -> None:
    """
    :raises ValueError: if the hub's encoders differ in architecture, or in what they want to see
    """
    first = hub.encoders[0]
    for spec in hub.encoders:
        for field in COMMON:
            if getattr(spec, field) != getattr(first, field):
                raise ValueError(
                    f"method is {method!r}, but hub {hub.name!r} has encoders of different {field} "
                    f"({first.name}: {getattr(first, field)}, {spec.name}: {getattr(spec, field)}),"
                    " and their weights can't be combined: take another method, or a hub as "
                    "python -m vision_tasks.pretrain makes one"
                )
