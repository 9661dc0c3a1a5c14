"""Zips that Stable-Baselines3 saved: tensors and plain data are read, and nothing of them runs."""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubrl.architectures import nature_features
from hubrl.files import reason, with_prefix

#: Bytes that an entry of a zip may have, since a stranger's could be a bomb: weights, plain data,
#: and how many times its packed bytes, above a megabyte.
MAX_UNPACKED, MAX_DATA, MAX_RATIO = 4 * 1024**3, 64 * 1024**2, 20
#: The first layer of a NatureCNN: its extractor, and the image's key where observations are Dicts.
FIRST_LAYER = re.compile(r"(.*features_extractor\.)(?:extractors\.([^.]+)\.)?cnn\.0\.weight")
#: The layers of a NatureCNN, and how many dimensions their weights have.
NATURE_LAYERS = {"cnn.0": 4, "cnn.2": 4, "cnn.4": 4, "linear.0": 2}


def policy_tensors(file: Path) -> dict[str, Tensor]:
    """
    The policy's tensors in a zip that SB3 saved; the pickled rest is not read.

    :raises ValueError: if it is no such zip, or its policy.pth holds anything but tensors
    """
    content = _zip_entry(file, "policy.pth", MAX_UNPACKED)
    try:
        _check_inner_zip(content)
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a stranger's pickle makes of torch's restricted reader
        # The rest of what torch says is how to have the pickle run nevertheless.
        found = re.search(r"unsupported [^\n]*", str(error), re.IGNORECASE)
        why = found[0] if found else reason(error).partition(" In PyTorch")[0]
        raise ValueError(
            f"{file}: policy.pth holds more than tensors or is damaged, so it was not read ({why})"
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{file}: policy.pth is no mapping of names to tensors")
    return {str(key): tensor for key, tensor in tensors.items()}


def agent_data(file: Path) -> dict[str, Any]:
    """
    The plain values of an agent that SB3 saved; what is pickled beside them stays text.

    :raises ValueError: if it is no such zip, or its data are no JSON
    """
    content = _zip_entry(file, "data", MAX_DATA)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: its data are not what Stable-Baselines3 writes")
    return data


def nature_tensors(policy: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """
    Those of the one NatureCNN in a policy, by its layers' names, float32.

    Actor, critic and targets may have copies, of which the actor's is taken.

    :param policy: what ``policy_tensors`` gave
    :param file: to be named in an error
    :raises ValueError: if there is none, it has other layers, or the agent sees several images
    """
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


def check_normalised(data: dict[str, Any], file: Path) -> None:
    """
    :param data: what ``agent_data`` gave
    :raises ValueError: if the agent's images were not divided by 255
    """
    policy_kwargs = data.get("policy_kwargs")
    if isinstance(policy_kwargs, dict) and str(policy_kwargs.get("normalize_images")) == "False":
        raise ValueError(
            f"{file} is an agent with normalize_images=False: its encoder wants other pixels than "
            "the 0..1 that a hub gives; train one without that argument"
        )


def seen_size(tensors: dict[str, Tensor], space: Any, file: Path) -> tuple[int, int]:
    """
    Height and width of the image in the observation space that fits the layers, in pixels; else
    of the smallest square one that does.

    :param tensors: what ``nature_tensors`` gave
    :param space: the observation space in the agent's data
    :raises ValueError: if neither fits
    """
    channels, n_inputs = tensors["cnn.0.weight"].shape[1], tensors["linear.0.weight"].shape[1]
    # A Box has its shape as a list, a Dict those of its Boxes in a text.
    shapes = f"{space.get('_shape')} {space.get('spaces')}" if isinstance(space, dict) else ""
    for found in re.findall(r"[(\[](\d{1,5}), (\d{1,5}), (\d{1,5})[)\]]", shapes):
        a, b, c = map(int, found)
        for n_channels, size in ((a, (b, c)), (c, (a, b))):
            if n_channels == channels and nature_features(size) == n_inputs:
                return size
    pixels = square_pixels(n_inputs)
    if pixels is None:
        raise ValueError(
            f"{file}: its images are not square, and its observation space doesn't tell their size"
        )
    return pixels, pixels


def square_pixels(n_features: int) -> int | None:
    """
    The side of the smallest square image that gives a NatureCNN's convolutions so many features.
    """
    side = math.isqrt(n_features // 64)
    if side == 0 or side * side * 64 != n_features:
        return None
    return (((side - 1) + 3 - 1) * 2 + 4 - 1) * 4 + 8


def _zip_entry(file: Path, entry: str, max_bytes: int) -> bytes:
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
            f"{file} is no agent saved by Stable-Baselines3, a zip with {entry} ({reason(error)})"
        ) from None


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
