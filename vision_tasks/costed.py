"""The models whose cost is told: one encoder, all of them, and the pathway that chooses."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hubrl.specs import HubSpec
from vision_tasks.hubs import load_vision_hub
from vision_tasks.methods import Method, Settings, build_method
from vision_tasks.methods.hub_pathway import HubPathwayMethod
from vision_tasks.tasks import Classification

# Shape letters: B batch, M encoders to choose from, C H W image.

SINGLE, ENSEMBLE, PATHWAY = "single", "ensemble-j", "hub-pathway"
#: A part of the pathway.
GENERATOR = "generator"
#: The pathway over twice as many encoders: its time and memory should be the same.
DOUBLED = "hub-pathway, hub doubled"
MODELS = (SINGLE, ENSEMBLE, PATHWAY, DOUBLED)


class Setup(NamedTuple):
    """
    What is costed.

    :param hub: a name, a folder or a YAML file; weight files are not needed
    :param n_outputs: of each model
    :param image_size: side of the images, in pixels
    :param batch_size: images of a batch
    :param top_k: encoders that an image activates
    :param generator: a key of ``hubrl.generators.GENERATORS``
    :param device: that measurements run on
    """

    hub: str
    n_outputs: int = 100
    image_size: int = 224
    batch_size: int = 12
    top_k: int = 2
    generator: str = "resnet10"
    device: str = "cpu"


def costed_hub(setup: Setup) -> HubSpec:
    """
    The hub's cards, at the setup's image size.

    :raises ValueError: as ``load_vision_hub`` does
    """
    with torch.device("meta"):
        return load_vision_hub(setup.hub, setup.image_size, pretrained=False)


def check_setup(hub: HubSpec, setup: Setup) -> None:
    """
    :raises ValueError: if one of the models can't be built of the hub
    """
    for name in MODELS:
        build_model(hub, setup, name, device="meta")


def build_model(hub: HubSpec, setup: Setup, name: str, device: str | None = None) -> Method:
    """
    A model with random weights.

    :param hub: as ``costed_hub`` gives it
    :param name: one of ``MODELS``; ``single`` is the hub's first encoder
    :param device: default: the setup's; ``meta`` for shapes alone
    :raises ValueError: if the setup doesn't fit the hub
    """
    if name == SINGLE:
        hub = hub.only(hub.encoder_names[0])
    elif name == DOUBLED:
        hub, name = doubled(hub), PATHWAY
    settings = Settings(
        seed=0,
        image_size=setup.image_size,
        top_k=setup.top_k,
        generator=setup.generator,
        pretrained=False,
    )
    with torch.device(device or setup.device):
        try:
            return build_method(name, hub, Classification(setup.n_outputs), settings)
        except NotImplementedError:
            raise ValueError(
                f"hub {hub.name!r} ({', '.join(spec.architecture for spec in hub.encoders)}) has "
                "a model that knows no meta device, on which models are counted, such as a RegNet "
                "of torchvision: take another"
            ) from None


def doubled(hub: HubSpec) -> HubSpec:
    """The hub with each encoder a second time, under another name."""
    copies = (dataclasses.replace(spec, name=f"{spec.name}-2") for spec in hub.encoders)
    return dataclasses.replace(hub, encoders=(*hub.encoders, *copies))


class SpreadGenerator(nn.Module):
    """
    A generator that runs in full, and then chooses at random for each image.

    A trained one spreads a batch over all encoders, an untrained one may send it to the same two.

    :param generator: of the pathway
    :param n_encoders: to choose from
    """

    SPREAD = 2.0  # of scores: far beyond what an untrained generator tells images apart by

    def __init__(self, generator: nn.Module, n_encoders: int) -> None:
        super().__init__()
        self.generator = generator
        self.n_encoders = n_encoders
        self.random = torch.Generator().manual_seed(0)

    def forward(self, images_BCHW: Tensor, noise_BM: Tensor | None) -> Tensor:
        """Scores (B, M)."""
        scores_BM: Tensor = self.generator(images_BCHW, noise_BM)
        spread_BM = torch.randn(len(images_BCHW), self.n_encoders, generator=self.random)
        return scores_BM - scores_BM.detach() + self.SPREAD * spread_BM.to(scores_BM.device)


def spread_routing(method: Method) -> Method:
    """The method; a pathway of it chooses as in ``SpreadGenerator``."""
    if isinstance(method, HubPathwayMethod):
        pathway = method.model.pathway
        n_choices = len(pathway.encoders) - len(pathway.always_active)
        pathway.generator = SpreadGenerator(pathway.generator, n_choices)  # type: ignore[assignment]
    return method


def random_batch(setup: Setup, n_images: int | None = None) -> tuple[Tensor, Tensor]:
    """
    Images (B, C, H, W) uint8 and classes (B,) on the setup's device.

    :param n_images: default: those of a batch
    """
    n = setup.batch_size if n_images is None else n_images
    images_BCHW = torch.randint(0, 256, (n, 3, setup.image_size, setup.image_size))
    targets_B = torch.randint(0, setup.n_outputs, (n,))
    return images_BCHW.to(setup.device, torch.uint8), targets_B.to(setup.device)


def train_step(method: Method, images_BCHW: Tensor, targets_B: Tensor) -> None:
    """Forward and backward, without the optimizer, whose time and memory grow with the hub."""
    method.train().zero_grad(set_to_none=True)
    method.loss(images_BCHW, targets_B).total.backward()


def predict(method: Method, images_BCHW: Tensor) -> None:
    """Forward in evaluation mode, without gradients."""
    method.eval()
    with torch.no_grad():
        method(images_BCHW)
