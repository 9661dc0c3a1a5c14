"""Encoders built from their specs: preprocessing card, trunk, verified weights, casts."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from hubrl.architectures import (
    ARCHITECTURES,
    find_architecture,
    patch_size,
    with_resampled_positions,
)
from hubrl.files import file_sha256, reason
from hubrl.precision import fast_layout, nature_layout
from hubrl.specs import N_GOLDEN, EncoderSpec, HubSpec

# Shape letters: B batch, D features, C H W image.

MIN_IMAGE_SIZE = 32  # pixels of a side, which libraries' convolutions halve five times
MAX_NUMBERS = 2**30  # of an encoder, 4 GB in float32: a stranger's card could name any model
#: What a weight file may hold; it becomes float32.
REAL = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
#: Where timm's LeViT, TinyViT, EfficientFormer and others keep, in evaluation mode, what they have
#: computed of their attention's biases.
BIAS_CACHE = "attention_bias_cache"
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as OpenCV's RGB to grey


class Encoder(nn.Module):
    """
    One encoder of a hub: images as the environment gives them -> features.

    Normalisation statistics and dropout stay in evaluation mode even while the weights are
    trained: dispatch makes sub-batches of down to one row, and rollout and update must agree.

    :param spec: the encoder's card
    :param trunk: network from preprocessed images (B, C, H, W) to features (B, D)
    """

    def __init__(self, spec: EncoderSpec, trunk: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.trunk = trunk.eval()
        self.is_small = spec.architecture in ARCHITECTURES  # ours; not of a library
        self._sees_as_learner = False  # a cast copy of one that learns: it must round alike
        self._is_safe_by_channels = not any(map(_breaks_by_channels, trunk.modules()))
        self._caching = [m for m in trunk.modules() if hasattr(m, BIAS_CACHE)]
        self._forget_biases()
        # Each step of a rollout asks for them, and a walk through the modules takes 30 us.
        self.weights = tuple(trunk.parameters())
        self._mark_weights()
        shape = (1, -1, 1, 1)
        self.register_buffer("mean", torch.tensor(spec.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(shape), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        self._lay_out()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._mark_weights()  # a deep copy's have lost it

    def forward(self, images_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """
        Features (B, D) of raw images.

        :param images_BCHW: uint8 in 0..255 or float in 0..1, of any size and channel number that
            ``check_image_shape`` accepts
        :param dtype: what the trunk computes in; the features have it, too
        """
        images_BCHW = self.preprocess(images_BCHW, dtype)
        images_BCHW = images_BCHW.contiguous(memory_format=self._layout(images_BCHW))
        with torch.autocast(images_BCHW.device.type, dtype, enabled=dtype != torch.float32):
            features_BD: Tensor = self.trunk(images_BCHW)
        self._forget_biases()
        if self.spec.n_frames > 1:
            features_BD = features_BD.reshape(-1, self.spec.features_dim)
        return features_BD

    def _mark_weights(self) -> None:
        for weight in self.weights:
            weight.is_encoder = True  # type: ignore[attr-defined]

    def preprocess(self, images_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """
        What the card asks for: range, channels, size, mean and standard deviation.

        Where it runs on each frame, the frames of an image follow each other as rows.
        """
        if images_BCHW.dtype == torch.uint8:
            # Exact in bfloat16, too: it holds the integers up to 256.
            images_BCHW = images_BCHW.to(dtype).div_(255.0)
        images_BCHW = _to_channels(images_BCHW, self.spec)
        if tuple(images_BCHW.shape[-2:]) != self.spec.image_size:
            images_BCHW = F.interpolate(
                images_BCHW.float(), self.spec.image_size, mode="bilinear", antialias=True
            )
        if self.spec.mean != (0.0,) or self.spec.std != (1.0,):
            images_BCHW = (images_BCHW - self.mean) / self.std
        return images_BCHW.to(dtype)

    @property
    def is_frozen(self) -> bool:
        """Whether no weight learns at present."""
        return not any(weight.requires_grad for weight in self.weights)

    def cast(self, dtype: torch.dtype) -> Encoder:
        """A copy that doesn't learn, whose layers hold what ``forward`` would cast each time."""
        encoder = copy.deepcopy(self).requires_grad_(False)
        encoder._sees_as_learner = not self.is_frozen
        for layer in encoder.modules():
            # Others, as timm's StdConv2d, compute with their weights before they are cast.
            if type(layer).forward in (nn.Conv2d.forward, nn.Linear.forward):
                layer.to(dtype)
        return encoder

    def freeze_first(self, n_layers: int) -> None:
        """
        Let the first convolutions or linear layers, and all that precedes the next, not learn.

        :param n_layers: at least 0, and fewer than there are
        :raises ValueError: if it is not
        """
        layers = [m for m in self.trunk.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        if not 0 <= n_layers < len(layers):
            raise ValueError(
                f"freeze_layers is {n_layers}, allowed: 0..{len(layers) - 1} for encoder "
                f"{self.spec.name!r}, of whose {len(layers)} layers one must learn; to keep it as "
                "it is, name it in freeze"
            )
        for module in self.trunk.modules():
            if n_layers == 0 or module is layers[n_layers]:
                return
            for weight in module.parameters(recurse=False):
                weight.requires_grad_(False)

    def _layout(self, images_BCHW: Tensor) -> torch.memory_format:
        """
        By whether it learns, not by whether gradients are computed.

        Else rollout and update, or swapped encoders and others, would round otherwise.
        """
        if not self._is_safe_by_channels:
            return torch.contiguous_format
        if not self.is_small:
            return fast_layout(images_BCHW)
        return nature_layout(images_BCHW, self._sees_as_learner or not self.is_frozen)

    def _forget_biases(self) -> None:
        """Else the next gradient would pass the graph of this one, or none would reach them."""
        for module in self._caching:
            setattr(module, BIAS_CACHE, {})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._lay_out()
        return self

    def _lay_out(self) -> None:
        """Weights as the images will be, or each call would copy them."""
        if self.is_small or not self._is_safe_by_channels:
            return
        for weight in self.trunk.parameters():
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=fast_layout(weight))

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode; whether the weights learn is ``requires_grad``'s business."""
        return super().train(False)


def is_encoder_weight(weight: Tensor) -> bool:
    """Whether it is a trained weight of an encoder; copies of modules don't remember it."""
    return getattr(weight, "is_encoder", False)


def _breaks_by_channels(module: nn.Module) -> bool:
    """
    Whether torch 2.14 writes past its memory in its gradient, of pixels by channels on an AVX2
    CPU: 1x1 convolutions with a stride over few channels, as RepVGG, MobileOne and FastViT begin.
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels < 8
    )


def is_frozen(module: nn.Module) -> bool:
    """Whether it has weights of which none learns at present."""
    learning = [weight.requires_grad for weight in module.parameters()]
    return bool(learning) and not any(learning)


class Casts:
    """
    Weights in the format of computation, kept for a phase in which none changes.

    A rollout needs them at each step, and for a few rows casting takes as long as computing.
    Versions of weights alone would not do: SB3's polyak updates leave no trace on a tensor.
    """

    def __init__(self) -> None:
        self._weights: dict[object, Tensor] = {}
        self._encoders: dict[object, Encoder] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Casts:
        """Empty: a copy's weights are others."""
        return Casts()

    def weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A layer's weight in ``dtype``, without a gradient; cast anew after a change in place."""
        key = (id(weight), dtype, weight._version)
        if key not in self._weights:
            self._weights[key] = weight.detach().to(dtype)
        return self._weights[key]

    def encoder(self, i: int, encoder: Encoder, dtype: torch.dtype) -> Encoder:
        """
        A frozen copy of encoder i in ``dtype``, made anew after a change in place; in float32 it.
        """
        if dtype == torch.float32:  # as its weights are: a copy would take their memory once more
            return encoder
        key = (i, dtype, *(weight._version for weight in encoder.weights))
        if key not in self._encoders:
            self._encoders[key] = encoder.cast(dtype)
        return self._encoders[key]


def build_encoder(hub: HubSpec, spec: EncoderSpec, *, pretrained: bool = True) -> Encoder:
    """
    Build one encoder of a hub and load its weights.

    :param hub: the hub that the spec is of; names the folder of the weight file
    :param spec: the encoder's card
    :param pretrained: read the weight file; otherwise random weights: orthogonal, as SB3 gives
        NatureCNN, and for models of libraries their own
    :raises ValueError: if the architecture is unknown, or the weight file is missing, truncated,
        has another sha256 or other layers than its card says
    """
    path = hub.weights_path(spec) if pretrained else None
    return encoder_of(spec, None if path is None else read_weights(path, spec))


def encoder_of(spec: EncoderSpec, weights: Mapping[str, Tensor] | None) -> Encoder:
    """
    An encoder of weights that are in memory.

    :param spec: the encoder's card
    :param weights: float32, named as in the trunk; None for random ones
    :raises ValueError: if the architecture is unknown, or doesn't fit the weights or the card
    """
    # A seeded agent must not depend on whether its encoders were built before it: weights from a
    # file draw no random numbers.
    with torch.random.fork_rng(devices=[], enabled=weights is not None):
        trunk, found_shape = _build_trunk(spec)
        if weights is None and spec.architecture in ARCHITECTURES:
            orthogonal_init(trunk)
    if weights is not None:
        _load_weights(trunk, weights, spec)
    _check_features_dim(spec, found_shape)
    return Encoder(spec, trunk)


def read_weights(path: Path, spec: EncoderSpec) -> dict[str, Tensor]:
    """
    All tensors of a weight file, float32, after its sha256 was compared with the card's.

    :raises ValueError: if the file is missing, truncated or another one
    """
    if not path.is_file():
        raise ValueError(
            f"encoder {spec.name!r}: its weight file {path} is missing; put it there, "
            "or run with random weights (--random-init)"
        )
    found = file_sha256(path)
    if found != spec.sha256:
        raise ValueError(
            f"encoder {spec.name!r}: {path} has sha256 {found[:12]}..., its card says "
            f"{str(spec.sha256)[:12]}...: the file is truncated or not the one described; "
            "get it again, or correct the card"
        )
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"encoder {spec.name!r}: {path} is not safetensors ({error})") from None
    return as_float32(tensors, f"encoder {spec.name!r}: {path}")


def as_float32(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """
    The tensors of a weight file in float32.

    :param where: begins the message
    :raises ValueError: if one has another type than those in ``REAL``
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in REAL:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in REAL)
            raise ValueError(f"{where}: {key} is {tensor.dtype}, allowed: {names}")
    return {key: tensor.float() for key, tensor in tensors.items()}


def golden_features(encoder: Encoder) -> tuple[float, ...]:
    """
    What a card's ``golden`` holds: a weighted mean of the encoder's features for each of 8 images.

    Four images have the size of the card, four are larger and pass through resizing; where the
    encoder sees the newest frame alone, these are stacks. Write a card with
    ``dataclasses.replace(spec, golden=golden_features(build_encoder(hub, spec)))``.

    :return: numbers of 6 digits; on another machine equal to a thousandth of the largest
    """
    spec, n = encoder.spec, N_GOLDEN // 2
    height, width = spec.image_size
    larger = (height + height // 4, width + width // 4)
    exact, resized = probe_channels(spec)
    with torch.no_grad():
        exact_BD = encoder(probe_images(n, exact, spec.image_size))
        resized_BD = encoder(probe_images(n, resized, larger))
    # Unequal weights notice features that changed places; positive ones don't cancel.
    weights_D = 1.0 + torch.arange(spec.features_dim) % 7
    means_B = torch.cat([exact_BD, resized_BD]) @ (weights_D / weights_D.sum())
    return tuple(float(f"{value:.6g}") for value in means_B.tolist())


def probe_channels(spec: EncoderSpec) -> tuple[int, int]:
    """Channels of images that the encoder takes as they are, and of stacks that it chooses from."""
    if spec.frames == "each":
        return spec.n_frames * spec.channels, spec.n_frames * spec.channels
    return spec.channels, max(4, spec.channels) if spec.frames == "last" else spec.channels


def probe_images(n_images: int, channels: int, image_size: tuple[int, int]) -> Tensor:
    """
    Made-up scenes that every machine draws alike: rectangles that move over stripes.

    :param channels: moments of a scene, or its colours
    :param image_size: (height, width); larger images show the same scenes
    :return: (B, C, H, W) uint8
    """
    # Integers alone, in a square of 256 by 256.
    index = torch.arange(n_images).view(-1, 1, 1, 1)
    moment = torch.arange(channels).view(1, -1, 1, 1)
    y, x = (torch.arange(size) * 256 // size for size in image_size)
    y, x = y.view(-1, 1), x.view(1, -1)
    stripes = (y * (index % 5) + x * (index % 3 + 1)) // 32 % 2
    images_BCHW = (index * 37 % 96 + stripes * (index * 53 % 64)).expand(-1, channels, -1, -1)
    for k in range(8):
        top = index * 71 + k * 97 + moment * (k % 5 - 2) * 4
        left = index * 113 + k * 59 + moment * (k % 3 - 1) * 6
        rows = (y - top) % 256 < 8 + (index * 13 + k * 29) % 40
        columns = (x - left) % 256 < 8 + (index * 31 + k * 17) % 40
        brightness = 255 - (index * 61 + k * 83) % 200
        images_BCHW = torch.where(rows & columns, brightness, images_BCHW)
    return images_BCHW.to(torch.uint8)


def orthogonal_init(module: nn.Module) -> None:
    """SB3's initialisation of a features extractor: orthogonal with gain sqrt(2), biases 0."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.orthogonal_(layer.weight, gain=math.sqrt(2))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def with_features_dim(spec: EncoderSpec) -> EncoderSpec:
    """
    The card with the features_dim that its architecture gives.

    :raises ValueError: if the architecture is unknown, or the image too small for it
    """
    try:
        _, shape = _build_trunk(spec)
    except NotImplementedError:  # on the meta device, which torchvision's RegNets don't know
        with torch.device("cpu"):
            _, shape = _build_trunk(spec)
    return dataclasses.replace(spec, features_dim=math.prod(shape) * spec.n_frames)


def at_image_size(hub: HubSpec, px: int) -> HubSpec:
    """
    The hub with encoders that see images of another size.

    A card that changes has the features_dim of its new size and no golden features.

    :param px: of both sides; rounded up to whole patches for a vision transformer, whose position
        embeddings ``hubrl.architectures.with_resampled_positions`` resamples
    :raises ValueError: if it is below 32, or an architecture can't take it
    """
    if px < MIN_IMAGE_SIZE:
        raise ValueError(
            f"hub {hub.name!r}: image size is {px} px, allowed: {MIN_IMAGE_SIZE} px or more"
        )
    return dataclasses.replace(hub, encoders=tuple(_at_size(spec, px) for spec in hub.encoders))


def check_image_shape(spec: EncoderSpec, shape: tuple[int, ...]) -> None:
    """
    Refuse images (C, H, W) that the encoder can't take.

    :raises ValueError: if the shape has not three dimensions or its channels come last, the image
        is less than half as high or wide as the encoder wants, or the channels cannot be adapted
    """
    where = f"encoder {spec.name!r}"
    if len(shape) != 3:
        raise ValueError(
            f"observation space has shape {tuple(shape)}, but {where} takes images (C, H, W)"
        )
    channels, *size = shape
    if size[1] < min(channels, size[0]):  # by the smallest dimension, as SB3 tells it
        raise ValueError(
            f"observation space has shape {tuple(shape)}, channels last, but {where} takes images "
            "(C, H, W): SB3's VecTransposeImage turns uint8 images, a wrapper of yours others"
        )
    if any(have < want / 2 for have, want in zip(size, spec.image_size, strict=True)):
        raise ValueError(
            f"observation space has images of {size[0]}x{size[1]} px, but {where} takes "
            f"{spec.image_size[0]}x{spec.image_size[1]} px and no less than half of it; "
            "render larger observations"
        )
    if not takes_channels(spec, channels):
        n = spec.n_frames if spec.frames == "each" else spec.channels
        raise ValueError(
            f"observation space has {channels} channels, but {where} takes {_wanted(spec)}; "
            f"stack {n} grey frames (VecFrameStack) or use another hub"
        )


def takes_channels(spec: EncoderSpec, channels: int) -> bool:
    """Whether the encoder sees images of so many channels, grey and RGB made of each other."""
    seen = _frame_channels(channels, spec)
    return seen == spec.channels or {seen, spec.channels} == {1, 3}


def check_companions(spec: EncoderSpec, others: Collection[EncoderSpec]) -> None:
    """
    Refuse an encoder beside which no images suit the others of a hub.

    :raises ValueError: if there is no number of channels that both take
    """
    for other in others:
        wanted = {n for s in (spec, other) for n in (s.channels, s.n_frames, 3 * s.n_frames)}
        if not any(takes_channels(spec, n) and takes_channels(other, n) for n in wanted):
            raise ValueError(
                f"encoder {spec.name!r} takes {_wanted(spec)}, but {other.name!r} of the hub "
                f"{_wanted(other)}: no images suit both; begin another hub with it"
            )


def _wanted(spec: EncoderSpec) -> str:
    n = spec.n_frames
    if spec.frames == "each":
        return f"{n} frames, grey or RGB: {n} or {3 * n} channels"
    return f"{spec.channels} channels"


def _load_weights(trunk: nn.Module, weights: Mapping[str, Tensor], spec: EncoderSpec) -> None:
    own, unused = trunk.state_dict().keys(), find_architecture(spec).unused_layers or ("\0",)
    used = OrderedDict(
        (key, w) for key, w in weights.items() if key in own or not key.startswith(unused)
    )
    used.update(with_resampled_positions(trunk, used))
    # Files don't say it, and MNASNet must know in which version of it its layers are named.
    used._metadata = {"": {"version": trunk._version}}  # type: ignore[attr-defined]
    try:
        trunk.load_state_dict(used)
    except RuntimeError as error:
        raise ValueError(
            f"encoder {spec.name!r}: {spec.weights or 'a set of weights'} does not fit "
            f"architecture {spec.architecture!r}: {reason(error)}"
        ) from None


@torch.no_grad()
def _build_trunk(spec: EncoderSpec) -> tuple[nn.Module, tuple[int, ...]]:
    """The trunk, and the shape of the features of one image."""
    try:
        _check_numbers(spec)
        trunk = find_architecture(spec).build(spec).eval()
        features = trunk(torch.zeros(1, spec.channels, *spec.image_size))
    # A convolution without a pixel left, or a transformer that was made for another size.
    except (RuntimeError, AssertionError) as error:
        if isinstance(error, NotImplementedError) and torch.get_default_device().type == "meta":
            raise
        raise ValueError(
            f"encoder {spec.name!r}: image_size {list(spec.image_size)} in its card does not fit "
            f"architecture {spec.architecture!r} ({reason(error)}); correct the card"
        ) from None
    return trunk, tuple(features.shape[1:])


def _check_numbers(spec: EncoderSpec) -> None:
    """Refuse one that is too large for the memory, before it takes any."""
    try:
        with torch.device("meta"):
            trunk = find_architecture(spec).build(spec)
    except NotImplementedError:  # torchvision's RegNets know no meta device; all are smaller
        return
    n_numbers = sum(parameter.numel() for parameter in trunk.parameters())
    if n_numbers > MAX_NUMBERS:
        raise ValueError(
            f"encoder {spec.name!r}: architecture {spec.architecture!r} would have {n_numbers:,} "
            f"numbers with features_dim {spec.features_dim} and {spec.channels} channels, allowed: "
            f"{MAX_NUMBERS:,}; correct the card"
        )


def _at_size(spec: EncoderSpec, px: int) -> EncoderSpec:
    patch = patch_size(spec)
    side = -(-px // patch) * patch
    if spec.image_size == (side, side):
        return spec
    with torch.device("meta"):  # shapes alone
        return with_features_dim(dataclasses.replace(spec, image_size=(side, side), golden=None))


def _check_features_dim(spec: EncoderSpec, found: tuple[int, ...]) -> None:
    if found != (spec.features_dim // spec.n_frames,):
        raise ValueError(
            f"encoder {spec.name!r}: features_dim is {spec.features_dim} in its card, but the "
            f"architecture gives {found} at {spec.image_size[0]}x{spec.image_size[1]} px"
            + (f" for each of {spec.n_frames} frames" if spec.n_frames > 1 else "")
        )


def _to_channels(images_BCHW: Tensor, spec: EncoderSpec) -> Tensor:
    channels = _frame_channels(images_BCHW.shape[1], spec)
    if spec.frames == "each":
        images_BCHW = images_BCHW.reshape(-1, channels, *images_BCHW.shape[2:])
    elif spec.frames == "last":
        images_BCHW = images_BCHW[:, -channels:]
    if channels == spec.channels:
        return images_BCHW
    if spec.channels == 3:
        return images_BCHW.expand(-1, 3, -1, -1)
    red_B1HW, green_B1HW, blue_B1HW = images_BCHW.split(1, dim=1)
    grey_B1HW: Tensor = LUMA[0] * red_B1HW + LUMA[1] * green_B1HW + LUMA[2] * blue_B1HW
    return grey_B1HW


def _frame_channels(channels: int, spec: EncoderSpec) -> int:
    """Channels that the encoder sees at once, before they are adapted; 0 for none."""
    if spec.frames == "last":
        return 3 if channels % 3 == 0 else 1
    if spec.frames == "each":
        return {spec.n_frames: 1, 3 * spec.n_frames: 3}.get(channels, 0)
    return channels
