"""Encoders that libraries download, and those of files that the user has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hubrl.encoders import with_features_dim
from hubrl.fetching import conversions
from hubrl.files import file_sha256, reason
from hubrl.specs import TIMM_PREFIX, EncoderSpec, cache_folder, closest


class Backbone(NamedTuple):
    """Where a ResNet-50 is in one of torchvision's nets, and the epsilon of its normalisation."""

    prefix: str
    eps: float = conversions.BATCH_NORM_EPS


#: torchvision builds the nets of the two with R-CNN in their names without an epsilon.
BACKBONES = {
    "ResNet50_Weights.IMAGENET1K_V1": Backbone(""),
    "ResNet50_Weights.IMAGENET1K_V2": Backbone(""),
    "MaskRCNN_ResNet50_FPN_Weights.COCO_V1": Backbone("backbone.body.", eps=0.0),
    "KeypointRCNN_ResNet50_FPN_Weights.COCO_V1": Backbone("backbone.body.", eps=0.0),
    "DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1": Backbone("backbone."),
}

#: Files that no library downloads, by their names.
FILES: dict[str, conversions.Conversion] = {"moco_v2_800ep_pretrain.pth.tar": conversions.moco}


def from_torchvision(weights: str, spec: EncoderSpec) -> dict[str, Tensor]:
    """
    The ResNet-50 of a net of torchvision, from its cache or downloaded by it.

    :param weights: a key of ``BACKBONES``
    :raises ValueError: if it is none, or the file can't be had or is damaged
    """
    if weights not in BACKBONES:
        raise ValueError(
            f"encoder {spec.name!r}: provider is 'torchvision:{weights}', allowed: torchvision: "
            f"and one of {', '.join(BACKBONES)}"
        )
    try:
        from torchvision.models import get_weight
    except ImportError:
        raise ValueError(
            f"encoder {spec.name!r}: torchvision's {weights} needs torchvision: "
            f"{conversions.INSTALL_VISION}"
        ) from None
    entry = get_weight(weights)
    file = Path(torch.hub.get_dir(), "checkpoints", Path(entry.url).name)
    try:
        _check_hash(file)
        state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # no network, no such rights, a damaged file
        raise ValueError(
            f"encoder {spec.name!r}: torchvision's {weights} can't be had ({reason(error)}); put "
            f"{entry.url} into {file.parent}"
        ) from None
    return conversions.backbone(state, spec, *BACKBONES[weights])


def from_user_file(name: str, spec: EncoderSpec) -> dict[str, Tensor]:
    """
    A file that the user has put into ``files`` in the cache.

    :param name: a key of ``FILES``
    :raises ValueError: if it is none, or the file is missing or can't be read
    """
    if name not in FILES:
        raise ValueError(
            f"encoder {spec.name!r}: provider is 'file:{name}', allowed: file: and one of "
            f"{', '.join(FILES)}"
        )
    file = cache_folder() / "files" / name
    if not file.is_file():
        raise ValueError(
            f"encoder {spec.name!r}: {file} is missing; put it there; source: {spec.source}"
        )
    return FILES[name](file.read_bytes(), spec)


def timm_card(model: str) -> EncoderSpec:
    """
    The card of a pretrained model of timm, still without weights.

    :raises ValueError: if timm is not installed, or has no such model, weights for it or a licence
    """
    config = _timm_config(model)
    spec = EncoderSpec(
        name=re.sub(r"[^a-z0-9_-]+", "_", model.lower()),
        architecture=f"timm:{model.partition('.')[0]}",
        features_dim=1,
        image_size=tuple(config.input_size[-2:]),
        channels=3,
        mean=tuple(config.mean),
        std=tuple(config.std),
        frames="last",
        license=SPDX.get(config.license, config.license or ""),
        source=f"timm {model}, https://huggingface.co/{config.hf_hub_id}",
        provider=TIMM_PREFIX + model,
    )
    if not spec.is_licensed:
        raise ValueError(
            f"timm states no licence for {model!r}: find it, and make a hub of your own with "
            f"`python -m hubrl.hubs add FOLDER --from-timm {model} --license ID`"
        )
    with torch.device("meta"):  # shapes alone
        return with_features_dim(spec)


#: timm's identifiers that SPDX spells otherwise; the others aren't in its list.
SPDX = {
    "apache-2.0": "Apache-2.0",
    "mit": "MIT",
    "bsd-3-clause": "BSD-3-Clause",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "cc-by-4.0": "CC-BY-4.0",
}


def from_timm(model: str, spec: EncoderSpec) -> dict[str, Tensor]:
    """
    The weights of a model of timm: a file in ``files`` in the cache, or downloaded by timm.

    :param model: a name of ``timm.list_models(pretrained=True)``
    :raises ValueError: if they can't be had
    """
    import timm

    config = _timm_config(model)
    file = cache_folder() / "files" / f"{model}.safetensors"
    overlay = {"file": str(file)} if file.is_file() else None
    try:
        trunk = timm.create_model(
            model, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay
        )
    except Exception as error:  # timm and its download know many
        raise ValueError(
            f"encoder {spec.name!r}: timm's {model} can't be had ({reason(error)}); put "
            f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors there as "
            f"{file}"
        ) from None
    tensors: dict[str, Tensor] = trunk.state_dict()
    return tensors


def _timm_config(model: str) -> Any:
    try:
        import timm
    except ImportError:
        raise ValueError(f"hub 'timm:{model}' needs timm: {conversions.INSTALL_VISION}") from None
    names = timm.list_models(pretrained=True)
    short = [name.partition(".")[0] for name in names]
    if model not in names and model not in short:
        raise ValueError(
            f"timm has no pretrained model {model!r}{closest(model, [*short, *names])}"
        )
    return timm.get_pretrained_cfg(model)


def _check_hash(file: Path) -> None:
    """Against the start of its sha256, which the names of torchvision's files have."""
    start = re.search(r"-([0-9a-f]{8,})\.", file.name)
    if start and file.is_file() and not file_sha256(file).startswith(start[1]):
        raise ValueError(f"{file} is damaged; remove it")
