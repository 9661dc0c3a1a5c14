"""hubrl: reinforcement learning that stands on a hub of pretrained encoders."""

from hubrl.callback import PathwayCallback
from hubrl.combined import HubCombinedExtractor
from hubrl.extractor import HubFeaturesExtractor
from hubrl.optimizer import EncoderScaledAdam
from hubrl.pathway import HubPathway, PathwayOutput
from hubrl.specs import EncoderSpec, HubSpec, list_hubs, load_hub

__all__ = [
    "EncoderScaledAdam",
    "EncoderSpec",
    "HubCombinedExtractor",
    "HubFeaturesExtractor",
    "HubPathway",
    "HubSpec",
    "PathwayCallback",
    "PathwayOutput",
    "list_hubs",
    "load_hub",
]
