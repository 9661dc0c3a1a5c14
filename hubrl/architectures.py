"""The trunks that a card may name: our own, and those of timm, torchvision and packages."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hubrl.specs import EncoderSpec, closest

# Shape letters: B batch, D features, C H W image.

MAX_LINEAR = 2**25  # numbers of a NatureCNN's linear layer; SB3's has 1.6 million


class NatureConv(nn.Module):
    """
    The three convolutions of Mnih et al. 2015: (B, C, H, W) -> (B, D), D = 3136 at 84 px.

    Layers are named as in SB3's ``NatureCNN``, so that its weights fit.

    :param channels: input channels
    :param width: multiplies the channels of all layers, and with them D
    """

    def __init__(self, channels: int, width: int = 1) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(channels, 32 * width, kernel_size=8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32 * width, 64 * width, kernel_size=4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64 * width, 64 * width, kernel_size=3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features (B, D) of preprocessed images."""
        features_BD: Tensor = self.cnn(images_BCHW)
        return features_BD


class NatureCNN(NatureConv):
    """
    ``NatureConv`` and the linear layer that follows it in SB3's ``NatureCNN``.

    :param channels: input channels
    :param image_size: (height, width) of the input, which sets the linear layer's width
    :param features_dim: D, 512 in SB3 unless told otherwise
    """

    def __init__(self, channels: int, image_size: tuple[int, int], features_dim: int) -> None:
        super().__init__(channels)
        n_inputs = max(1, nature_features(image_size))  # the convolutions refuse tiny images
        self.linear = nn.Sequential(nn.Linear(n_inputs, features_dim), nn.ReLU())

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features (B, D) of preprocessed images."""
        features_BD: Tensor = self.linear(self.cnn(images_BCHW))
        return features_BD


class Architecture(NamedTuple):
    """How to build a trunk, and which layers of a weight file it leaves out if it lacks them."""

    build: Callable[[EncoderSpec], nn.Module]
    unused_layers: tuple[str, ...] = ()


def _nature_cnn(spec: EncoderSpec) -> nn.Module:
    n_numbers = spec.features_dim * nature_features(spec.image_size)
    if n_numbers > MAX_LINEAR:
        raise ValueError(
            f"encoder {spec.name!r}: features_dim is {spec.features_dim}, allowed of nature_cnn at "
            f"{spec.image_size[0]}x{spec.image_size[1]} px: "
            f"{MAX_LINEAR // nature_features(spec.image_size)} at most"
        )
    return NatureCNN(spec.channels, spec.image_size, spec.features_dim)


#: The trunks of our own that a card may name.
ARCHITECTURES: dict[str, Architecture] = {
    "nature_cnn": Architecture(_nature_cnn),
    # An agent's linear layer belongs to its own game: this trunk takes the convolutions alone.
    "nature_conv": Architecture(lambda spec: NatureConv(spec.channels), unused_layers=("linear.",)),
    # As wide as two: what comparisons with two activated encoders need.
    "nature_conv_wide": Architecture(lambda spec: NatureConv(spec.channels, width=2)),
}


def find_architecture(spec: EncoderSpec) -> Architecture:
    """
    What the card's ``architecture`` names: a key of ``ARCHITECTURES``, or a key of ``FAMILIES`` and
    a model of that library, such as ``timm:resnet18``.

    :raises ValueError: if there is none; the message has the closest one
    """
    family, colon, model = spec.architecture.partition(":")
    if spec.architecture in ARCHITECTURES:
        return ARCHITECTURES[spec.architecture]
    try:
        if colon and family in FAMILIES:
            return FAMILIES[family](model)
    except ValueError as error:
        raise ValueError(f"encoder {spec.name!r}: {error}") from None
    hint = closest(spec.architecture, ARCHITECTURES)
    raise ValueError(
        f"encoder {spec.name!r}: architecture {spec.architecture!r} is unknown{hint}; "
        f"architectures: {', '.join([*ARCHITECTURES, *(f'{name}:MODEL' for name in FAMILIES)])}"
    )


def nature_features(image_size: tuple[int, int]) -> int:
    """How many features ``NatureConv`` has of an image (height, width); none of a tiny one."""
    height, width = (max(0, _conv_sizes(size)) for size in image_size)
    return 64 * height * width


def patch_size(spec: EncoderSpec) -> int:
    """
    What the sides of an image must be a multiple of: a vision transformer's patches; else 1.

    :raises ValueError: if the architecture is unknown
    """
    if not spec.architecture.startswith("timm:"):
        return 1
    with torch.device("meta"):
        return _patch(find_architecture(spec).build(spec))


def with_resampled_positions(trunk: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    A vision transformer's weights for the trunk's image size, where they were learned at another.

    The grid of position embeddings is resampled bicubically, without antialiasing, as DINOv2 does
    it; embeddings of class and register tokens stay. Other weights are given back as they are.

    :param trunk: a trunk of any architecture
    :param weights: of this architecture; the grid of its ``pos_embed`` (1, N, D) must be a square
    """
    weights = dict(weights)
    own, found = getattr(trunk, "pos_embed", None), weights.get("pos_embed")
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if own is None or found is None or grid is None or own.shape == found.shape:
        return weights
    height, width = grid
    n_tokens = own.shape[1] - height * width
    side = math.isqrt(found.shape[1] - n_tokens)
    if found.shape[1] == n_tokens + side * side:
        grid_1HWD = found[:, n_tokens:].view(1, side, side, -1)
        grid_1DHW = F.interpolate(grid_1HWD.permute(0, 3, 1, 2), (height, width), mode="bicubic")
        new_1ND = grid_1DHW.flatten(2).transpose(1, 2)
        weights["pos_embed"] = torch.cat([found[:, :n_tokens], new_1ND], dim=1)
    return weights


def _timm(model: str) -> Architecture:
    """A timm model without its classifier."""
    timm = _import("timm", f"timm:{model}")
    if not timm.is_model(model):
        raise ValueError(f"timm has no model {model!r}{closest(model, timm.list_models())}")
    try:
        config = timm.get_pretrained_cfg(model)
    except RuntimeError as error:  # of a tag that no weights have
        raise ValueError(f"timm has no weights of model {model!r}: {error}") from None

    def build(spec: EncoderSpec) -> nn.Module:
        # Transformers are built for one size.
        size = {"img_size": spec.image_size} if config and config.fixed_input_size else {}
        trunk: nn.Module = timm.create_model(
            model, pretrained=False, num_classes=0, in_chans=spec.channels, **size
        )
        if size:
            _check_patches(spec, _patch(trunk))
        return trunk

    heads = (config.classifier if config else None) or ()
    names = (heads,) if isinstance(heads, str) else heads
    # Some have more in a head than the classifier, such as a norm; what the trunk keeps it takes.
    tops = (name.partition(".")[0] for name in names)
    return Architecture(build, unused_layers=tuple(f"{top}." for top in tops))


def _packaged(model: str) -> Architecture:
    """A net that a package holds, as timm has it but for details."""
    if model not in PACKAGED:
        raise ValueError(
            f"architecture 'packaged:{model}' is unknown{closest(model, PACKAGED)}; "
            f"packaged: {', '.join(PACKAGED)}"
        )
    _import("timm", f"packaged:{model}")
    return Architecture(PACKAGED[model])


def _mobilenetv2_keras(spec: EncoderSpec) -> nn.Module:
    """MobileNetV2 with Keras' padding and epsilon."""
    import timm

    trunk: nn.Module = timm.create_model(
        "mobilenetv2_100", num_classes=0, in_chans=spec.channels, pad_type="same", bn_eps=1e-3
    )
    return trunk


def _resnet50_thin(spec: EncoderSpec) -> nn.Module:
    """ResNet-50 of half the width as Caffe has it: strides and pooling lie elsewhere."""
    from timm.models.resnet import Bottleneck, ResNet

    trunk: Any = ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        channels=(32, 64, 128, 256),
        num_classes=0,
        in_chans=spec.channels,
    )
    trunk.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
    for stage in (trunk.layer2, trunk.layer3, trunk.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    net: nn.Module = trunk
    return net


#: Nets of packages that no library has in just this form.
PACKAGED: dict[str, Callable[[EncoderSpec], nn.Module]] = {
    "mobilenetv2_keras": _mobilenetv2_keras,
    "resnet50_thin": _resnet50_thin,
}


def _torchvision(model: str) -> Architecture:
    """A torchvision classification model without the last linear layer, which tells its classes."""
    models = _import("torchvision", f"torchvision:{model}").models
    names = models.list_models(module=models)
    if model not in names:
        raise ValueError(
            f"torchvision has no classification model {model!r}{closest(model, names)}"
        )

    def build(spec: EncoderSpec) -> nn.Module:
        if spec.channels != 3:
            raise ValueError(
                f"encoder {spec.name!r}: channels is {spec.channels}, but torchvision's models "
                "take 3; correct the card"
            )
        trunk: nn.Module = models.get_model(model, weights=None, **_options(model))
        linear = [name for name, layer in trunk.named_modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise ValueError(
                f"encoder {spec.name!r}: architecture {spec.architecture!r} has no linear "
                "classifier, whose input could be the features; take another model"
            )
        trunk.set_submodule(linear[-1], nn.Identity())
        if any(isinstance(layer, nn.MultiheadAttention) for layer in trunk.modules()):
            # Taken without gradients alone: rollout and update would round otherwise.
            torch.backends.mha.set_fastpath_enabled(False)
        return trunk

    return Architecture(build, unused_layers=TORCHVISION_UNUSED)


#: Where torchvision's models have classifiers, auxiliary ones of their training included.
TORCHVISION_UNUSED = ("fc.", "classifier.", "heads.", "head.", "aux1.", "aux2.", "AuxLogits.")


def _options(model: str) -> dict[str, bool]:
    """As the pretrained weights of the two models that turn ImageNet's colours into their own."""
    if model not in ("googlenet", "inception_v3"):
        return {}
    return {"transform_input": True, "aux_logits": False, "init_weights": False}


#: Libraries whose models a card may name, as ``LIBRARY:MODEL``.
FAMILIES: dict[str, Callable[[str], Architecture]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "packaged": _packaged,
}


def _import(library: str, architecture: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError:
        raise ValueError(
            f'architecture {architecture!r} needs {library}: pip install "hubrl[vision]"'
        ) from None


def _patch(trunk: nn.Module) -> int:
    embedding = getattr(trunk, "patch_embed", None)
    if embedding is None or not hasattr(embedding, "grid_size"):  # or of patches that overlap
        return 1
    size: tuple[int, int] = embedding.patch_size
    return max(size)


def _check_patches(spec: EncoderSpec, patch: int) -> None:
    if any(side % patch for side in spec.image_size):
        height, width = spec.image_size
        raise ValueError(
            f"encoder {spec.name!r}: image_size is [{height}, {width}], but {spec.architecture} "
            f"cuts images into patches of {patch} px, allowed: multiples of it, such as "
            f"{max(1, height // patch) * patch} or {(height // patch + 1) * patch}"
        )


def _conv_sizes(pixels: int) -> int:
    """Pixels left of a side after the three convolutions."""
    for kernel, stride in ((8, 4), (4, 2), (3, 1)):
        pixels = (pixels - kernel) // stride + 1
    return pixels
