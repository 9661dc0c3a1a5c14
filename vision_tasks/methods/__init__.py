"""Hub-Pathway and what it is compared with: one file a method, all behind ``Method``."""

from __future__ import annotations

from hubrl.specs import HubSpec, closest
from vision_tasks.methods.attention import Attention
from vision_tasks.methods.distill import Distill
from vision_tasks.methods.ensembles import EnsembleI, EnsembleJ
from vision_tasks.methods.hub_pathway import HubPathwayMethod
from vision_tasks.methods.knowledge_flow import KnowledgeFlow
from vision_tasks.methods.logme import LogMe
from vision_tasks.methods.method import Losses, Method, Settings
from vision_tasks.methods.model_soup import ModelSoup
from vision_tasks.methods.single import Single
from vision_tasks.methods.uniform import Uniform
from vision_tasks.methods.zoo_tuning import ZooTuning
from vision_tasks.tasks import Task

__all__ = ["METHODS", "USED_BY", "Losses", "Method", "Settings", "build_method"]

#: By name; ``single`` takes an encoder, as ``single:ENCODER``.
METHODS: dict[str, type[Method]] = {
    "single": Single,
    "ensemble-j": EnsembleJ,
    "ensemble-i": EnsembleI,
    "hub-pathway": HubPathwayMethod,
    "uniform": Uniform,
    "attention": Attention,
    "distill": Distill,
    "knowledge-flow": KnowledgeFlow,
    "zoo-tuning": ZooTuning,
    "model-soup": ModelSoup,
    "logme": LogMe,
}
#: Settings that some methods alone make use of, by key path.
USED_BY = {
    "hub.top_k": ("hub-pathway",),
    "hub.generator": ("hub-pathway",),
    "hub.exploration_coef": ("hub-pathway",),
    "hub.exploitation_coef": ("hub-pathway", "uniform"),
}


def build_method(name: str, hub: HubSpec, task: Task, settings: Settings) -> Method:
    """
    An untrained method.

    :param name: a key of ``METHODS``, or ``single:ENCODER``
    :param hub: the encoders' cards, at the size that they shall run at
    :raises ValueError: if there is no such method or encoder, or hub or ``settings.swap`` don't fit
        the method
    """
    method, colon, encoder = name.partition(":")
    check_method(name)
    if settings.swap and not METHODS[method].can_swap:
        raise ValueError(
            f"hub.swap is {settings.swap.n_resident}, but method {method!r} needs all its encoders "
            f"in memory: set hub.swap to null; methods that swap: "
            f"{', '.join(key for key, value in METHODS.items() if value.can_swap)}"
        )
    if colon:
        hub = hub.only(encoder)
    elif method == "single" and len(hub.encoders) > 1:
        raise ValueError(
            f"method is 'single', but hub {hub.name!r} has {len(hub.encoders)} encoders: choose "
            f"one, as single:{hub.encoder_names[0]}"
        )
    return METHODS[method](hub, task, settings)


def check_method(name: str) -> None:
    """
    :raises ValueError: if there is no such method
    """
    method, colon, _ = name.partition(":")
    if method not in METHODS or (colon and method != "single"):
        allowed = ["single:ENCODER" if key == "single" else key for key in METHODS]
        raise ValueError(
            f"method is {name!r}{closest(method, METHODS)}, allowed: {', '.join(allowed)}"
        )
