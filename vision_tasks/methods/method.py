"""The interface of a method: a model, its losses, and the phases that it learns in."""

from __future__ import annotations

import contextlib
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hubrl.aggregation import Concat
from hubrl.encoders import Encoder, build_encoder
from hubrl.pathway import TopK
from hubrl.precision import resolve_precision
from hubrl.sections import Schedule
from hubrl.specs import EncoderSpec, HubSpec
from vision_tasks.swap import Swap
from vision_tasks.tasks import Task

# Shape letters: B batch, O outputs, D features, C H W image.

#: Batches of images and targets, one pass over all, in a fixed order.
Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class Losses(NamedTuple):
    """What a training step minimises, and what it consists of."""

    total: Tensor
    """Scalar, coefficients included."""
    parts: dict[str, Tensor]
    """Scalars without their coefficients, for the log."""


class Settings(NamedTuple):
    """
    What methods are built from beside hub and task.

    :param seed: of the new layers
    :param image_size: side of the data's images, in pixels
    :param top_k: encoders that an image activates; ``auto``: 2, or 1 of a hub of one
    :param generator: a key of ``hubrl.generators.GENERATORS``
    :param exploration_coef: weight of the pathway exploration loss over a phase
    :param exploitation_coef: weight of the exploitation loss
    :param pretrained: load the hub's weights; otherwise random ones
    :param precision: what encoders compute in: float32, bfloat16 or auto
    :param swap: how encoders are swapped; None: all are in memory
    """

    seed: int
    image_size: int
    top_k: TopK = "auto"
    generator: str = "even"
    exploration_coef: Schedule = Schedule.constant(0.3)
    exploitation_coef: float = 1.0
    pretrained: bool = True
    precision: str = "float32"
    swap: Swap | None = None


class Method(nn.Module):
    """
    A model of an image task and how it learns.

    The training loop asks for nothing else: ``begin`` each phase, ``loss`` for each step, and at
    the end of each epoch ``choose``, then ``results`` for evaluation. Weights that learn are those
    that require gradients after ``begin``. A resumed run begins its phase anew before the
    checkpoint is loaded.

    :param hub: the encoders' cards, at the size that the images have
    :param task: what is learned
    :param settings: the rest
    """

    #: Each is trained for the whole number of epochs.
    phases: ClassVar[tuple[str, ...]] = ("train",)
    #: Share of the phase's steps that are done, 0..1; the training loop sets it before each step.
    progress: float = 0.0
    #: Whether ``settings.swap`` may be given.
    can_swap: ClassVar[bool] = False
    #: Whether ``begin`` gives it other modules, which its checkpoint then has.
    begins_anew: ClassVar[bool] = False

    def __init__(self, hub: HubSpec, task: Task, settings: Settings) -> None:
        super().__init__()
        self.hub, self.task, self.settings = hub, task, settings

    def begin(self, phase: str, batches: Batches) -> None:
        """
        Prepare a phase.

        :param phase: one of ``phases``
        :param batches: training images, which may be looked at; no weight may learn from them
        """

    def advice(self, losses: dict[str, float]) -> str | None:
        """
        What a user should know after an epoch that went wrong, and change; None if all is well.

        :param losses: means over the epoch of ``Losses.parts``
        """
        return None

    def choose(self, batches: Batches) -> None:
        """
        Choose among what was trained so far, in evaluation mode; a buffer keeps the choice.

        :param batches: validation images
        """

    def loss(self, images_BCHW: Tensor, targets_B: Tensor) -> Losses:
        """
        Losses of a batch of uint8 images; unless a method says otherwise the task's loss of its
        outputs.
        """
        loss = self.task.losses(self(images_BCHW), targets_B).mean()
        return Losses(loss, {"task": loss})

    @abstractmethod
    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Outputs (B, O) of uint8 images, float32."""

    def results(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """Outputs (B, O) of all models that are results by themselves; ``""`` is the method's."""
        return {"": self(images_BCHW)}


class Predictor(nn.Module):
    """
    An encoder and a linear head: what is fine-tuned where a single encoder is.

    :param hub: that the encoder is of
    :param spec: its card
    :param task: gives the head's outputs
    :param settings: the head's seed, the encoder's weights and its precision
    """

    def __init__(self, hub: HubSpec, spec: EncoderSpec, task: Task, settings: Settings) -> None:
        super().__init__()
        with seeded(settings.seed, spec.name):
            self.encoder: Encoder = build_encoder(hub, spec, pretrained=settings.pretrained)
        self.head = build_head(spec, task, settings.seed)
        self._precision = settings.precision

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Features (B, D) of uint8 images, float32."""
        dtype = resolve_precision(self._precision, images_BCHW.device)
        features_BD: Tensor = self.encoder(images_BCHW, dtype).float()
        return features_BD

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Outputs (B, O) of uint8 images, float32."""
        outputs_BO: Tensor = self.head(self.features(images_BCHW))
        return outputs_BO


def build_head(spec: EncoderSpec, task: Task, seed: int) -> nn.Linear:
    """
    An untrained head for an encoder, the same in every method that has the same seed.

    :param spec: the encoder's card
    :param task: gives the number of outputs and the bias
    """
    with seeded(seed, spec.name):
        head = nn.Linear(spec.features_dim, task.n_outputs)
    nn.init.constant_(head.bias, task.output_start)
    return head


def build_aggregator(hub: HubSpec, task: Task) -> Concat:
    """
    The layer over the weighted outputs of the encoders' heads; it starts as their sum.

    :param hub: the encoders' cards
    :param task: gives the number of outputs
    """
    aggregator = Concat([task.n_outputs] * len(hub.encoders), task.n_outputs, relu=False)
    for block in aggregator.blocks:
        assert isinstance(block, nn.Linear)
        nn.init.eye_(block.weight)
    return aggregator


@contextlib.contextmanager
def seeded(seed: int, name: str) -> Iterator[None]:
    """Inside, torch's random numbers follow from the seed and the name of what is built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
        yield
