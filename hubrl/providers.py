"""Where encoders come from: SB3's zips, weight files, timm, torchvision, Hugging Face."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hubrl.encoders import with_features_dim
from hubrl.specs import EncoderSpec

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INSTALL_SHARE = 'pip install "hubrl[share]"'
MAX_UNPACKED = 4 * 1024**3  # bytes of the weights in a zip: a stranger's could be a bomb
FIRST_LAYER = re.compile(r"([\w.]*\.)?\w*features_extractor\.(extractors\.\w+\.)?cnn\.0\.weight")
N_FEATURES = 512  # of SB3's NatureCNN unless told otherwise


class Provided(NamedTuple):
    """An encoder that is not in a hub yet."""

    card: EncoderSpec
    """Without weights, sha256 and golden features."""
    tensors: dict[str, Tensor]
    """As the architecture names them."""


class Wishes(NamedTuple):
    """What a user says of an encoder beside its source; None: what the source says."""

    name: str | None = None
    license: str | None = None
    architecture: str | None = None
    image_size: int | None = None
    """Height and width in pixels."""


def require_license(card: EncoderSpec) -> None:
    """
    :raises ValueError: if the card states no licence
    """
    if not card.license.strip():
        raise ValueError(
            f"encoder {card.name!r} has no licence: give --license with its SPDX identifier, such "
            "as MIT or Apache-2.0"
        )


def from_sb3(file: Path, wishes: Wishes) -> Provided:
    """
    The features extractor of an agent that Stable-Baselines3 saved, if it is its NatureCNN.

    Nothing of the zip is executed: the weights pass torch's reader of tensors alone, and the
    pickled rest is not read.

    :param file: what ``model.save`` wrote
    :raises ValueError: if it is no such zip, holds anything but tensors, or another architecture
    """
    tensors = _nature_tensors(policy_tensors(file), file)
    channels, n_features = tensors["cnn.0.weight"].shape[1], len(tensors["linear.0.weight"])
    default = "nature_cnn" if n_features == N_FEATURES else "nature_conv"
    size = wishes.image_size or _pixels(tensors["linear.0.weight"].shape[1], file)
    card = _card(
        wishes,
        name=file.stem,
        architecture=wishes.architecture or default,
        channels=channels,
        image_size=(size, size),
        source=f"features extractor of the agent {file.name}",
    )
    return Provided(card, tensors)


def from_file(file: Path, wishes: Wishes) -> Provided:
    """
    A safetensors file whose architecture the user names.

    :raises ValueError: if it can't be read, or the architecture is not given or unknown
    """
    if wishes.architecture is None:
        raise ValueError(
            f"{file} doesn't say what it is: give --architecture, such as nature_cnn, "
            "timm:resnet18 or torchvision:resnet18"
        )
    tensors = _read_tensors(file)
    return Provided(_foreign_card(wishes, file.stem, f"weight file {file.name}", tensors), tensors)


def from_timm(model: str, wishes: Wishes) -> Provided:
    """
    A pretrained model of timm, downloaded by timm.

    :param model: a name of ``timm.list_models(pretrained=True)``
    :raises ValueError: if timm is not installed, has no such model, or can't download its weights
    """
    card = _foreign_card(
        wishes._replace(architecture=f"timm:{model.partition('.')[0]}"), model, f"timm {model}", {}
    )
    import timm

    try:
        trunk = timm.create_model(model, pretrained=True, num_classes=0)
    except Exception as error:  # timm and its download know many
        raise ValueError(_no_download(f"timm model {model!r}", card.architecture, error)) from None
    config = trunk.pretrained_cfg
    size = wishes.image_size or config["input_size"][-1]
    card = dataclasses.replace(
        card,
        image_size=(size, size),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        license=wishes.license or config.get("license") or "",
    )
    return Provided(with_features_dim(card), trunk.state_dict())


def from_torchvision(model: str, wishes: Wishes) -> Provided:
    """
    A classification model of torchvision with its default weights, downloaded by torchvision.

    :param model: a name of ``torchvision.models.list_models()``
    :raises ValueError: if torchvision is not installed, has no such model, or can't download it
    """
    architecture = f"torchvision:{model}"
    card = _foreign_card(
        wishes._replace(architecture=architecture), model, f"torchvision {model}", {}
    )
    from torchvision import models

    weights = models.get_model_weights(model).DEFAULT
    try:
        tensors = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:
        raise ValueError(_no_download(f"torchvision {weights}", architecture, error)) from None
    transform = weights.transforms()
    size = wishes.image_size or transform.crop_size[0]
    card = dataclasses.replace(
        card,
        image_size=(size, size),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        source=f"torchvision {weights}, {weights.url}",
    )
    return Provided(with_features_dim(card), dict(tensors))


def from_hf(address: str, wishes: Wishes) -> Provided:
    """
    Weights of a Hugging Face repository: safetensors, and what its ``config.json`` says of timm.

    :param address: ``OWNER/NAME`` for its model.safetensors, or ``OWNER/NAME/FILE``
    :raises ValueError: if huggingface_hub is not installed, or the file can't be had or read
    """
    owner, _, rest = address.partition("/")
    name, _, file = rest.partition("/")
    if not owner or not name:
        raise ValueError(f"--from-hf {address}: give OWNER/NAME or OWNER/NAME/FILE.safetensors")
    repository = f"{owner}/{name}"
    tensors = _read_tensors(download(repository, file or "model.safetensors"))
    config: dict[str, Any] = {}
    if wishes.architecture is None:
        config = json.loads(download(repository, "config.json").read_text())
        if not isinstance(config, dict) or "architecture" not in config:
            raise ValueError(
                f"{repository}/config.json names no timm architecture: give --architecture"
            )
        wishes = wishes._replace(architecture=f"timm:{config['architecture']}")
    card = _foreign_card(wishes, name, f"Hugging Face {repository}", tensors)
    return Provided(_with_timm_config(card, config.get("pretrained_cfg", {}), wishes), tensors)


def policy_tensors(file: Path) -> dict[str, Tensor]:
    """
    The policy's tensors in a zip that SB3 saved; the pickled rest is not read.

    :raises ValueError: if it is no such zip, or its policy.pth holds anything but tensors
    """
    content = zip_entry(file, "policy.pth")
    try:
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's pickle makes of torch's restricted reader
        raise ValueError(
            f"{file}: policy.pth holds more than tensors or is damaged, so it was not read "
            f"({_reason(error)})"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{file}: policy.pth is no mapping of names to tensors")
    return {str(key): tensor for key, tensor in tensors.items()}


def zip_entry(file: Path, entry: str) -> bytes:
    """
    The bytes of an entry of a zip that SB3 saved.

    :raises ValueError: if it is no such zip, or the entry is too large
    """
    try:
        with zipfile.ZipFile(file) as archive:
            size = archive.getinfo(entry).file_size
            if size > MAX_UNPACKED:
                raise ValueError(f"{file}: {entry} would unpack to {size:,} bytes, too many")
            return archive.read(entry)
    except (OSError, KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(
            f"{file} is no agent saved by Stable-Baselines3, a zip with {entry} ({_reason(error)})"
        ) from None


def download(repository: str, file: str) -> Path:
    """
    A file of a Hugging Face repository, in huggingface_hub's own cache.

    :raises ValueError: if huggingface_hub is not installed or the file can't be had
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ValueError(
            f"Hugging Face repositories need huggingface_hub: {INSTALL_SHARE}"
        ) from None
    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # no network, no such repository, no right to read it
        raise ValueError(
            f"{repository}/{file} can't be downloaded ({_reason(error)}): check the name and the "
            "network, or get the file otherwise and give --from-file"
        ) from None


def _nature_tensors(policy: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Those of the one NatureCNN in a policy; actor, critic and targets have copies."""
    prefixes = [
        key.removesuffix("cnn.0.weight")
        for key in policy
        if re.fullmatch(
            r"([\w.]*\.)?\w*features_extractor\.(extractors\.\w+\.)?cnn\.0\.weight", key
        )
    ]
    if not prefixes:
        layers = sorted({key.rpartition(".")[0] for key in policy if "features_extractor" in key})
        raise ValueError(
            f"{file}: its features extractor is no NatureCNN of SB3, the only one that is known; "
            f"its layers: {', '.join(layers[:8]) or 'none'}"
        )
    prefix = min(prefixes, key=lambda prefix: ("target" in prefix, "critic" in prefix, prefix))
    keys = [f"cnn.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")]
    keys += ["linear.0.weight", "linear.0.bias"]
    found = {key: policy[prefix + key] for key in keys if prefix + key in policy}
    shapes = [tuple(found[key].shape[i] for i in (0, 2)) for key in keys[:6:2] if key in found]
    if len(found) < len(keys) or shapes != [(32, 8), (64, 4), (64, 3)]:
        raise ValueError(
            f"{file}: {prefix}cnn has other layers than SB3's NatureCNN: {', '.join(found)}"
        )
    return {key: tensor.float() for key, tensor in found.items()}


def _pixels(n_features: int, file: Path) -> int:
    """The smallest square image that gives the convolutions so many features."""
    side = math.isqrt(n_features // 64)
    if side * side * 64 != n_features:
        raise ValueError(f"{file}: it has seen images that are not square, which is not known")
    return (((side - 1) + 3 - 1) * 2 + 4 - 1) * 4 + 8


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return {key: tensor.float() for key, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} can't be read as safetensors ({_reason(error)})") from None


def _foreign_card(
    wishes: Wishes, name: str, source: str, tensors: dict[str, Tensor]
) -> EncoderSpec:
    """ImageNet's colours for the libraries' models, grey stacks for our own architectures."""
    architecture = wishes.architecture
    assert architecture is not None
    if ":" in architecture:
        size = wishes.image_size or 224
        colours = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "frames": "last", "channels": 3}
    else:
        size = wishes.image_size or 84
        first = tensors.get("cnn.0.weight", torch.empty(0, 4))
        colours = {"channels": first.shape[1]}
    return _card(
        wishes,
        name=name,
        architecture=architecture,
        image_size=(size, size),
        source=source,
        **colours,
    )


def _with_timm_config(card: EncoderSpec, config: Any, wishes: Wishes) -> EncoderSpec:
    """What a timm repository says of input and licence."""
    config = config if isinstance(config, dict) else {}
    changes: dict[str, Any] = {key: tuple(config[key]) for key in ("mean", "std") if key in config}
    if "input_size" in config and wishes.image_size is None:
        changes["image_size"] = tuple(config["input_size"][-2:])
    changes["license"] = wishes.license or config.get("license") or ""
    return with_features_dim(dataclasses.replace(card, **changes))


def _card(wishes: Wishes, *, name: str, source: str, **fields: Any) -> EncoderSpec:
    name = re.sub(r"[^a-z0-9_-]+", "_", (wishes.name or name).lower()).lstrip("_-") or "encoder"
    card = EncoderSpec(
        name=name, features_dim=1, license=wishes.license or "", source=source, **fields
    )
    return with_features_dim(card)


def _no_download(what: str, architecture: str, error: Exception) -> str:
    return (
        f"{what}: its weights can't be downloaded ({_reason(error)}); get them as safetensors "
        f"otherwise and give --from-file FILE --architecture {architecture}"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
