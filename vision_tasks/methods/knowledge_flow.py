"""``knowledge-flow``: frozen teachers' maps are mixed into a student, which becomes independent."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hubrl.encoder_list import EncoderList
from hubrl.encoders import Encoder
from hubrl.precision import resolve_precision
from hubrl.specs import HubSpec
from vision_tasks.methods.logme import LogMe
from vision_tasks.methods.method import Batches, Losses, Settings, seeded
from vision_tasks.tasks import Task

# Shape letters: B batch, S stages of the student and its features, C H W map, D features,
# O outputs.

#: Called with a module, its inputs and its output; gives another output, or None.
Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]

#: Where an encoder's features stand among its maps.
FEATURES = ""


class KnowledgeFlow(LogMe):
    """
    Knowledge flow (Liu, Peng, Schwing, ICLR 2019, arXiv 1904.05878).

    The student is the encoder that LogME ranks first, with its pretrained weights; the teachers
    are all encoders of the hub, frozen. At the end of each of the student's stages, and into its
    pooled features, the teachers' are mixed: linear transforms of their maps, with learned
    normalised weights. The dependence loss, minus the logarithm of the student's own weight, makes
    it independent; the student alone is evaluated and is the result.

    Ours: a stage ends where maps become smaller, and is fed by the stage of each teacher that is
    as deep, at the student's map size; an encoder without maps (a transformer's tokens are none)
    takes part with its pooled features. The dependence loss' coefficient rises linearly from 0 to
    1 over the first half of training, and the teachers' weights are multiplied by what is left of
    it, so that the student is independent in time to learn alone in a run of any length. The
    regularizer that keeps the student's outputs from changing is left out.
    """

    #: Share of training from which the student learns alone.
    ALONE_FROM = 0.5

    def __init__(self, hub: HubSpec, task: Task, settings: Settings) -> None:
        super().__init__(hub, task, settings)
        with seeded(settings.seed, "knowledge-flow"):
            self.teachers = EncoderList(hub, hub.encoder_names, settings.pretrained)
        self.mixers = nn.ModuleList()
        self._stages: list[str] = []
        self._sources: list[list[tuple[int, str]]] = []

    def begin(self, phase: str, batches: Batches) -> None:
        """Choose the student, and find what of its teachers flows into which of its stages."""
        super().begin(phase, batches)
        images_1CHW = next(iter(batches()))[0][:1]
        student = find_stages(self.chosen[1].encoder, images_1CHW)
        teachers = [find_stages(teacher, images_1CHW) for teacher in self.teachers]
        self._stages = [name for name in student if name != FEATURES]
        self._sources = [
            [(i, name) for i, teacher in enumerate(teachers) for name in _as_deep(teacher, depth)]
            for depth in _depths(len(self._stages))
        ]
        self._sources.append([(i, FEATURES) for i in range(len(teachers))])
        self.mixers = nn.ModuleList(
            Mixer(n_channels, [teachers[i][name] for i, name in sources])
            for n_channels, sources in zip(student.values(), self._sources, strict=True)
        ).to(images_1CHW.device)

    def loss(self, images_BCHW: Tensor, targets_B: Tensor) -> Losses:
        """The task's loss of the mixture + (1 - the teachers' part) x dependence."""
        task = self.task.losses(self.mixture(images_BCHW), targets_B).mean()
        dependence = dependence_loss(torch.stack([mixer.shares()[0] for mixer in self._mixers()]))
        total = task + (1.0 - self._flow) * dependence
        return Losses(total, {"task": task, "dependence": dependence})

    def mixture(self, images_BCHW: Tensor) -> Tensor:
        """Outputs (B, O) of the student with what it has of its teachers at present."""
        if self._flow == 0.0:
            return self.forward(images_BCHW)
        dtype = resolve_precision(self.settings.precision, images_BCHW.device)
        maps = [
            maps_of(teacher, self._names(i), images_BCHW, dtype)
            for i, teacher in enumerate(self.teachers)
        ]
        *hooks, mix_features = [
            self._mix(mixer, [maps[i][name] for i, name in sources])
            for mixer, sources in zip(self._mixers(), self._sources, strict=True)
        ]
        student = self.chosen[1]
        with hooked(student.encoder.trunk, dict(zip(self._stages, hooks, strict=True))):
            features_BD = student.encoder(images_BCHW, dtype).float()
        mixed_BD11 = mix_features(student, (), features_BD[:, :, None, None])
        outputs_BO: Tensor = student.head(mixed_BD11.flatten(1))
        return outputs_BO

    def _mix(self, mixer: Mixer, theirs: list[Tensor]) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], own_BCHW: Tensor) -> Tensor:
            return mixer(own_BCHW, theirs, self._flow)  # type: ignore[no-any-return]

        return hook

    @property
    def _flow(self) -> float:
        """Factor of the teachers' weights: 1 at the start, 0 from where the student is alone."""
        return max(0.0, 1.0 - self.progress / self.ALONE_FROM)

    def _names(self, teacher: int) -> set[str]:
        return {name for sources in self._sources for i, name in sources if i == teacher}

    def _mixers(self) -> list[Mixer]:
        return [mixer for mixer in self.mixers if isinstance(mixer, Mixer)]


class Mixer(nn.Module):
    """
    A student's map and the transforms of teachers' maps, with normalised weights.

    :param n_channels: of the student's map
    :param teachers_channels: of each teacher's map
    """

    #: The student's share at the start: it is pretrained, and nothing is to scramble it.
    OWN_START = 0.8
    #: Factor of the learned scores, so that shares can change within a short training.
    SHARPNESS = 10.0

    def __init__(self, n_channels: int, teachers_channels: Sequence[int]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(
            nn.Conv2d(channels, n_channels, kernel_size=1, bias=False)
            for channels in teachers_channels
        )
        for transform in self.transforms.parameters():
            nn.init.zeros_(transform)
        odds = self.OWN_START / (1 - self.OWN_START) * len(teachers_channels)
        self.scores = nn.Parameter(torch.zeros(1 + len(teachers_channels)))
        with torch.no_grad():
            self.scores[0] = math.log(odds) / self.SHARPNESS

    def shares(self) -> Tensor:
        """Weights of the student and of each teacher; they sum to 1."""
        return (self.SHARPNESS * self.scores).softmax(dim=0)

    def forward(self, own_BCHW: Tensor, theirs: Sequence[Tensor], fade: float) -> Tensor:
        """
        The mixture, (B, C, H, W).

        :param own_BCHW: the student's map
        :param theirs: the teachers' maps, of any size
        :param fade: factor of the teachers' shares, 0..1; what they lose is the student's
        """
        shares = self.shares() * fade
        mixed_BCHW = own_BCHW * (1.0 - shares[1:].sum())
        for share, transform, map_BCHW in zip(shares[1:], self.transforms, theirs, strict=True):
            resized_BCHW = F.adaptive_avg_pool2d(transform(map_BCHW), own_BCHW.shape[-1])
            mixed_BCHW = mixed_BCHW + share * resized_BCHW
        return mixed_BCHW


def dependence_loss(own_shares_S: Tensor) -> Tensor:
    """
    Mean over the stages of minus the logarithm of the student's own share.

    :param own_shares_S: 0..1
    :return: scalar, at least 0
    """
    return -own_shares_S.log().mean()


@torch.no_grad()
def find_stages(encoder: Encoder, images_BCHW: Tensor) -> dict[str, int]:
    """
    Where the encoder's maps become smaller: the last module at each size, and its channels.

    Maps of one pixel are none, and none is larger than the one before; where all have one size,
    as a transformer's patches, there is no stage. Attention is no map, nor is what a module gives
    that is called several times. The last entry, ``""``, are the features.

    :param images_BCHW: uint8, at least one
    """
    names = {module: name for name, module in encoder.trunk.named_modules() if name}
    shapes: dict[str, list[torch.Size]] = {}
    n_rows = len(images_BCHW) * encoder.spec.n_frames

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        is_map = isinstance(output, Tensor) and output.ndim == 4 and len(output) == n_rows
        if is_map and not isinstance(module, (nn.Dropout, nn.Softmax)):
            shapes.setdefault(names[module], []).append(output.shape)

    with hooked(encoder.trunk, dict.fromkeys(names.values(), note)):
        features_BD = encoder(images_BCHW)
    last: dict[int, tuple[str, int]] = {}
    for name, ((_, channels, height, width), *others) in shapes.items():
        if not others and height == width and 1 < height <= min(last, default=height):
            last[height] = (name, channels)
    stages = dict(last.values()) if len(last) > 1 else {}
    return stages | {FEATURES: features_BD.shape[1]}


@torch.no_grad()
def maps_of(
    encoder: Encoder, names: set[str], images_BCHW: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """
    Outputs of modules of an encoder by their names, and its features (B, D, 1, 1) at ``""``.

    :param images_BCHW: uint8
    :param dtype: what the encoder computes in
    """
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        # A copy: what follows may write into the map itself.
        return lambda module, inputs, output: maps.update({name: output.clone()})

    with hooked(encoder.trunk, {name: keep(name) for name in names if name != FEATURES}):
        maps[FEATURES] = encoder(images_BCHW, dtype).float()[:, :, None, None]
    return maps


@contextlib.contextmanager
def hooked(trunk: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Inside, modules of the trunk have forward hooks, by their names."""
    handles = [
        trunk.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _depths(n_stages: int) -> list[float]:
    """0 for the first stage, 1 for the last."""
    return [i / max(n_stages - 1, 1) for i in range(n_stages)]


def _as_deep(stages: Mapping[str, int], depth: float) -> list[str]:
    """The stage of this depth, if there is any."""
    names = [name for name in stages if name != FEATURES]
    return [names[round(depth * (len(names) - 1))]] if names else []
