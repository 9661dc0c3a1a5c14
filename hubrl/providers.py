"""Where encoders come from: SB3's zips, weight files, timm, torchvision, Hugging Face."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hubrl.architectures import find_architecture, nature_features
from hubrl.encoders import as_float32, read_weights, with_features_dim
from hubrl.files import with_prefix
from hubrl.specs import HUB_FILE, EncoderSpec, HubSpec, load_hub

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INSTALL_SHARE = 'pip install "hubrl[share]"'
#: Bytes that an entry of a zip may have, since a stranger's could be a bomb: weights, plain data,
#: and how many times its packed bytes, above a megabyte.
MAX_UNPACKED, MAX_DATA, MAX_RATIO = 4 * 1024**3, 64 * 1024**2, 20
#: The first layer of a NatureCNN: its extractor, and the image's key where observations are Dicts.
FIRST_LAYER = re.compile(r"(.*features_extractor\.)(?:extractors\.([^.]+)\.)?cnn\.0\.weight")
#: The layers of a NatureCNN, and how many dimensions their weights have.
NATURE_LAYERS = {"cnn.0": 4, "cnn.2": 4, "cnn.4": 4, "linear.0": 2}
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
    if not card.is_licensed:
        raise ValueError(
            f"encoder {card.name!r} has no licence: give --license with its SPDX identifier, such "
            "as MIT or Apache-2.0"
        )


def from_sb3(file: Path, wishes: Wishes) -> Provided:
    """
    The features extractor of an agent that Stable-Baselines3 saved, if it is its NatureCNN.

    Of Dict observations it is that of the only image. Nothing of the zip is executed: the weights
    pass torch's reader of tensors alone, and of the rest plain JSON is read.

    :param file: what ``model.save`` wrote
    :raises ValueError: if it is no such zip, holds anything but tensors, or another architecture,
        or its images were not normalised as a hub's are
    """
    if wishes.architecture not in (None, "nature_cnn", "nature_conv"):
        raise ValueError(
            f"architecture is {wishes.architecture!r}, allowed of an agent of SB3: nature_cnn, "
            "nature_conv (its convolutions alone)"
        )
    tensors = _nature_tensors(policy_tensors(file), file)
    data = agent_data(file)
    _check_normalised(data, file)
    channels, steps = tensors["cnn.0.weight"].shape[1], data.get("num_timesteps")
    card = _card(
        wishes,
        name=file.stem,
        architecture=wishes.architecture or "nature_cnn",
        channels=channels,
        image_size=_wished_size(wishes) or _seen_size(tensors, data.get("observation_space"), file),
        frames="last" if channels == 1 else "stack",  # of a stack of grey frames the newest
        source=f"features extractor of the agent {file.name}",
        features_dim=len(tensors["linear.0.weight"]),
        pretraining={"steps": steps} if type(steps) is int else {},
    )
    return Provided(with_features_dim(card), tensors)


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
    card = _foreign_card(wishes, file.stem, f"weight file {file.name}", tensors)
    return Provided(with_features_dim(card), tensors)


def from_timm(model: str, wishes: Wishes) -> Provided:
    """
    A pretrained model of timm, downloaded by timm.

    :param model: a name of ``timm.list_models(pretrained=True)``
    :raises ValueError: if timm is not installed, has no such model, or can't download its weights
    """
    _refuse_architecture(wishes, "timm")
    architecture = f"timm:{model.partition('.')[0]}"
    tagged = wishes._replace(architecture=f"timm:{model}")
    card = _foreign_card(tagged, model, f"timm {model}", {})
    import timm

    known = timm.get_pretrained_cfg(model)
    if known is None or not known.has_weights:
        raise ValueError(f"timm has no pretrained weights of {model!r}; take another model")
    size = _wished_size(wishes) or tuple(known.input_size[1:])
    resized = {"img_size": size} if known.fixed_input_size else {}
    try:
        trunk = timm.create_model(model, pretrained=True, num_classes=0, **resized)
    except Exception as error:  # timm and its download know many
        raise ValueError(_no_download(f"timm model {model!r}", architecture, error)) from None
    card = dataclasses.replace(
        card,
        architecture=architecture,
        image_size=size,
        mean=tuple(known.mean),
        std=tuple(known.std),
        license=wishes.license or known.license or "",
    )
    return Provided(with_features_dim(card), trunk.state_dict())


def from_torchvision(model: str, wishes: Wishes) -> Provided:
    """
    A classification model of torchvision with its default weights, downloaded by torchvision.

    :param model: a name of ``torchvision.models.list_models()``
    :raises ValueError: if torchvision is not installed, has no such model, or can't download it
    """
    _refuse_architecture(wishes, "torchvision")
    architecture = f"torchvision:{model}"
    card = _foreign_card(
        wishes._replace(architecture=architecture), model, f"torchvision {model}", {}
    )
    from torchvision import models

    weights = models.get_model_weights(model).DEFAULT
    try:
        # Not the file as it is: some have names of layers that torchvision translates.
        trunk = models.get_model(model, weights=weights, progress=False)
    except Exception as error:
        raise ValueError(_no_download(f"torchvision {weights}", architecture, error)) from None
    transform = weights.transforms()
    card = dataclasses.replace(
        card,
        image_size=_wished_size(wishes) or (transform.crop_size[0],) * 2,
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        source=f"torchvision {weights}, {weights.url}",
    )
    return Provided(with_features_dim(card), trunk.state_dict())


def from_hf(address: str, wishes: Wishes) -> Provided:
    """
    An encoder of a Hugging Face repository: of a hub that it holds, or of a safetensors file.

    :param address: ``OWNER/NAME``, or ``OWNER/NAME/FILE`` for another file than model.safetensors
        and for one of several encoders of a hub
    :param wishes: without an architecture the repository's ``hub.yaml`` or timm's ``config.json``
        tells what the file is
    :raises ValueError: if huggingface_hub is not installed, the file can't be had or read, or what
        it is is not clear
    """
    owner, _, rest = address.partition("/")
    name, _, file = rest.partition("/")
    if not owner or not name:
        raise ValueError(f"--from-hf {address}: give OWNER/NAME or OWNER/NAME/FILE.safetensors")
    repository, config = f"{owner}/{name}", {}
    if wishes.architecture is None:
        cards = download_if_there(repository, HUB_FILE)
        if cards is not None:
            return _of_shared_hub(load_hub(cards), repository, file, wishes)
        config = _timm_config(repository)
        wishes = wishes._replace(architecture=f"timm:{config['architecture']}")
    tensors = _read_tensors(download(repository, file or "model.safetensors"))
    named = Path(file).stem if file else name
    card = _foreign_card(wishes, named, f"https://huggingface.co/{repository}", tensors)
    card = _with_timm_config(card, config.get("pretrained_cfg", {}), wishes)
    return Provided(with_features_dim(card), tensors)


def policy_tensors(file: Path) -> dict[str, Tensor]:
    """
    The policy's tensors in a zip that SB3 saved; the pickled rest is not read.

    :raises ValueError: if it is no such zip, or its policy.pth holds anything but tensors
    """
    content = zip_entry(file, "policy.pth", MAX_UNPACKED)
    try:
        _check_inner_zip(content)
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's pickle makes of torch's restricted reader
        # The rest of what torch says is how to have the pickle run nevertheless.
        found = re.search(r"unsupported [^\n]*", str(error), re.IGNORECASE)
        reason = found[0] if found else _reason(error).partition(" In PyTorch")[0]
        raise ValueError(
            f"{file}: policy.pth holds more than tensors or is damaged, so it was not read "
            f"({reason})"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{file}: policy.pth is no mapping of names to tensors")
    return {str(key): tensor for key, tensor in tensors.items()}


def agent_data(file: Path) -> dict[str, Any]:
    """
    The plain values of an agent that SB3 saved; what is pickled beside them stays text.

    :raises ValueError: if it is no such zip, or its data are no JSON
    """
    content = zip_entry(file, "data", MAX_DATA)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: its data are not what Stable-Baselines3 writes")
    return data


def zip_entry(file: Path, entry: str, max_bytes: int) -> bytes:
    """
    The bytes of an entry of a zip that SB3 saved.

    :param max_bytes: that the entry may have
    :raises ValueError: if it is no such zip, or the entry is too large or packed in another way
    """
    try:
        with zipfile.ZipFile(file) as archive:
            info = archive.getinfo(entry)
            if info.file_size > min(max_bytes, _most(info.compress_size)):
                raise ValueError(
                    f"{file}: {entry} would unpack to {info.file_size:,} bytes, too many"
                )
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(
                    f"{file}: {entry} is packed by method {info.compress_type}, allowed: stored or "
                    "deflated, as Stable-Baselines3 does it"
                )
            return archive.read(info)
    except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{file} is no agent saved by Stable-Baselines3, a zip with {entry} ({_reason(error)})"
        ) from None


def download(repository: str, file: str) -> Path:
    """
    A file of a Hugging Face repository, in huggingface_hub's own cache.

    :raises ValueError: if huggingface_hub is not installed or the file can't be had
    """
    path = download_if_there(repository, file)
    if path is None:
        raise ValueError(f"{repository} has no file {file}; look it up on Hugging Face")
    return path


def download_if_there(repository: str, file: str) -> Path | None:
    """
    The same, or None where the repository has no such file.

    :raises ValueError: if huggingface_hub is not installed or the repository can't be read
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise ValueError(
            f"Hugging Face repositories need huggingface_hub: {INSTALL_SHARE}"
        ) from None
    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # no network, no such repository, no right to read it
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise ValueError(
            f"{repository}/{file} can't be downloaded ({_reason(error)}): check the name and the "
            "network, or get the file otherwise and give --from-file"
        ) from None


def _nature_tensors(policy: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Those of the one NatureCNN in a policy; actor, critic and targets have copies."""
    found = [match for match in map(FIRST_LAYER.fullmatch, policy) if match]
    if not found:
        layers = sorted({key.rpartition(".")[0] for key in policy if "features_extractor" in key})
        raise ValueError(
            f"{file}: its features extractor is no NatureCNN of SB3, the only one that is known; "
            f"its layers: {', '.join(layers[:8]) or 'none'}"
        )
    owners = (match[1] for match in found)
    owner = min(owners, key=lambda name: ("target" in name, "critic" in name, name))
    images = [match[2] for match in found if match[1] == owner]
    if len(images) > 1:
        raise ValueError(
            f"{file}: its agent sees {len(images)} images ({', '.join(map(str, images))}), but an "
            "encoder is that of one; take an agent with one image"
        )
    prefix = owner if images[0] is None else f"{owner}extractors.{images[0]}."
    tensors = with_prefix(policy, prefix)
    _check_nature(tensors, prefix, file)
    # Copies: what a stranger's file says is several tensors may be one memory.
    return {key: tensor.float().clone() for key, tensor in tensors.items()}


def _check_nature(tensors: dict[str, Tensor], prefix: str, file: Path) -> None:
    layers = list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
    names = {f"{layer}.{part}" for layer in NATURE_LAYERS for part in ("weight", "bias")}
    if tensors.keys() != names:
        raise ValueError(
            f"{file}: {prefix}cnn has other layers than SB3's NatureCNN: {', '.join(layers[:8])}"
        )
    for key, tensor in tensors.items():
        layer, _, part = key.rpartition(".")
        n_dimensions = NATURE_LAYERS[layer] if part == "weight" else 1
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not is_plain or not tensor.is_floating_point() or tensor.ndim != n_dimensions:
            raise ValueError(
                f"{file}: {prefix}{key} is {tensor.dtype} of shape {tuple(tensor.shape)}, which is "
                "no layer of SB3's NatureCNN"
            )
    n_bytes = 4 * sum(tensor.numel() for tensor in tensors.values())
    if n_bytes > MAX_UNPACKED:  # one number may say that it is many
        raise ValueError(f"{file}: {prefix}cnn would have {n_bytes:,} bytes, too many")


def _check_normalised(data: dict[str, Any], file: Path) -> None:
    policy_kwargs = data.get("policy_kwargs")
    if isinstance(policy_kwargs, dict) and str(policy_kwargs.get("normalize_images")) == "False":
        raise ValueError(
            f"{file} is an agent with normalize_images=False: its encoder wants other pixels than "
            "the 0..1 that a hub gives; train one without that argument"
        )


def _seen_size(tensors: dict[str, Tensor], space: Any, file: Path) -> tuple[int, int]:
    """Of the image in the observation space that fits the layers; else the smallest square one."""
    channels, n_inputs = tensors["cnn.0.weight"].shape[1], tensors["linear.0.weight"].shape[1]
    # A Box has its shape as a list, a Dict those of its Boxes in a text.
    shapes = f"{space.get('_shape')} {space.get('spaces')}" if isinstance(space, dict) else ""
    for found in re.findall(r"[(\[](\d{1,5}), (\d{1,5}), (\d{1,5})[)\]]", shapes):
        a, b, c = map(int, found)
        for n_channels, size in ((a, (b, c)), (c, (a, b))):
            if n_channels == channels and nature_features(size) == n_inputs:
                return size
    pixels = _square_pixels(n_inputs)
    if pixels is None:
        raise ValueError(
            f"{file}: its images are not square, and its observation space doesn't tell their size"
        )
    return pixels, pixels


def _square_pixels(n_features: int) -> int | None:
    """A side of the smallest square image that gives the convolutions so many features."""
    side = math.isqrt(n_features // 64)
    if side == 0 or side * side * 64 != n_features:
        return None
    return (((side - 1) + 3 - 1) * 2 + 4 - 1) * 4 + 8


def _check_inner_zip(content: bytes) -> None:
    stream = io.BytesIO(content)
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > min(MAX_UNPACKED, _most(len(content))):
            raise ValueError(f"it would unpack to {size:,} bytes, too many")


def _most(n_bytes: int) -> int:
    """What so many packed bytes may unpack to; weights hardly shrink."""
    return 1024**2 + MAX_RATIO * n_bytes


def _of_shared_hub(hub: HubSpec, repository: str, file: str, wishes: Wishes) -> Provided:
    """The encoder with its card."""
    cards = [(card, card.weights) for card in hub.encoders if card.weights]
    found = [(card, weights) for card, weights in cards if file in ("", weights)]
    if len(found) != 1:
        files = ", ".join(weights for _, weights in cards)
        raise ValueError(
            f"--from-hf {repository}: which encoder of this hub? Give {repository}/FILE with one "
            f"of its files: {files}"
        )
    ((card, weights),) = found
    tensors = read_weights(download(repository, weights), card)
    card = dataclasses.replace(
        card,
        name=_valid_name(wishes.name or card.name),
        license=wishes.license or card.license,
        image_size=_wished_size(wishes) or card.image_size,
        weights=None,
        sha256=None,
        golden=None,
    )
    return Provided(with_features_dim(card), tensors)


def _timm_config(repository: str) -> dict[str, Any]:
    """A timm repository's ``config.json``."""
    file = download_if_there(repository, "config.json")
    try:
        config = None if file is None else json.loads(file.read_text())
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(
            f"{repository} has no {HUB_FILE} and no config.json that names an architecture of "
            "timm: give --architecture"
        )
    return config


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} can't be read as safetensors ({_reason(error)})") from None
    return as_float32(tensors, str(file))


def _foreign_card(
    wishes: Wishes, name: str, source: str, tensors: dict[str, Tensor]
) -> EncoderSpec:
    """
    ImageNet's colours for the libraries' models, grey stacks for our own architectures.

    :raises ValueError: if there is no such architecture
    """
    assert wishes.architecture is not None
    fields: dict[str, Any] = {"architecture": wishes.architecture, "name": name, "source": source}
    if ":" in wishes.architecture:
        fields |= {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "frames": "last", "channels": 3}
        card = _card(wishes, image_size=_wished_size(wishes) or (224, 224), **fields)
    else:
        first, linear = (tensors.get(f"{layer}.weight") for layer in ("cnn.0", "linear.0"))
        pixels = _square_pixels(linear.shape[-1]) if linear is not None and linear.ndim else None
        card = _card(
            wishes,
            image_size=_wished_size(wishes) or (pixels or 84,) * 2,
            channels=first.shape[1] if first is not None and first.ndim == 4 else 4,
            features_dim=N_FEATURES if linear is None or not linear.ndim else len(linear),
            **fields,
        )
    find_architecture(card)
    return card


def _with_timm_config(card: EncoderSpec, config: Any, wishes: Wishes) -> EncoderSpec:
    """What a timm repository says of input and licence."""
    config = config if isinstance(config, dict) else {}
    try:
        changes: dict[str, Any] = {
            key: tuple(config[key]) for key in ("mean", "std") if key in config
        }
        if "input_size" in config and wishes.image_size is None:
            changes["image_size"] = tuple(config["input_size"][-2:])
        license = wishes.license or config.get("license") or ""
        return dataclasses.replace(card, **changes, license=license)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{card.source}: its config.json is wrong ({_reason(error)})") from None


def _card(wishes: Wishes, *, name: str, features_dim: int = 1, **fields: Any) -> EncoderSpec:
    """A card whose features_dim is still to be found, unless the architecture takes any."""
    name = _valid_name(wishes.name or name)
    return EncoderSpec(name=name, features_dim=features_dim, license=wishes.license or "", **fields)


def _valid_name(text: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "_", text.lower()).lstrip("_-") or "encoder"


def _wished_size(wishes: Wishes) -> tuple[int, int] | None:
    return None if wishes.image_size is None else (wishes.image_size, wishes.image_size)


def _refuse_architecture(wishes: Wishes, library: str) -> None:
    if wishes.architecture is not None:
        raise ValueError(
            f"architecture is {wishes.architecture!r}, but a model of {library} is its own; leave "
            "--architecture out"
        )


def _no_download(what: str, architecture: str, error: Exception) -> str:
    return (
        f"{what}: its weights can't be downloaded ({_reason(error)}); get them as safetensors "
        f"otherwise and give --from-file FILE --architecture {architecture}"
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
