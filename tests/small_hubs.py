"""Small hubs for all rooms' tests: real weight files of random numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from hubrl import cli
from hubrl.architectures import find_architecture
from hubrl.encoders import build_encoder, golden_features
from hubrl.files import file_sha256
from hubrl.hubs import command
from hubrl.specs import EncoderSpec, HubSpec, load_hub, save_hub


def nature_spec(name: str, size: int = 36, architecture: str = "nature_conv") -> EncoderSpec:
    """A card of NatureCNN for small images; at 36 px it has 64 convolutional features."""
    return EncoderSpec(
        name=name,
        architecture=architecture,
        features_dim={"nature_conv": 64, "nature_conv_wide": 128, "nature_cnn": 512}[architecture],
        image_size=(size, size),
        channels=4,
        license="MIT",
        source="random numbers",
    )


def library_spec(architecture: str, features_dim: int, size: int = 36) -> EncoderSpec:
    """A card of a library's model for small colour images, or the newest of a stack."""
    return EncoderSpec(
        name=architecture.partition(":")[2],
        architecture=architecture,
        features_dim=features_dim,
        image_size=(size, size),
        channels=3,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        frames="last",
        license="MIT",
        source="random numbers",
    )


def write_hub(folder: Path, specs: list[EncoderSpec]) -> Path:
    """A hub folder with a weight file for each card."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for seed, spec in enumerate(specs):
        torch.manual_seed(100 + seed)
        trunk = find_architecture(spec).build(spec)
        for parameter in trunk.parameters():
            nn.init.normal_(parameter, std=0.1)
        file = folder / f"{spec.name}.safetensors"
        save_file(trunk.state_dict(), file)
        written.append(dataclasses.replace(spec, weights=file.name, sha256=file_sha256(file)))
    save_hub(HubSpec(name=folder.name, encoders=tuple(written)), folder)
    return folder


def add_golden(folder: Path) -> None:
    """Write the golden features of a hub's encoders into its cards."""
    hub = load_hub(folder)
    encoders = tuple(
        dataclasses.replace(spec, golden=golden_features(build_encoder(hub, spec)))
        for spec in hub.encoders
    )
    save_hub(dataclasses.replace(hub, encoders=encoders), folder)


class Outcome(NamedTuple):
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def failed(self) -> list[str]:
        """Encoder and check of each line that says FAILED."""
        lines = [line.split() for line in self.out.splitlines()]
        return [f"{words[1]} {words[2]}" for words in lines if words[0] == "FAILED"]


def call_hubs(*arguments: object) -> Outcome:
    """``hubrl hubs`` as a user calls it, to its exit."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run(command, "hubrl hubs", [str(argument) for argument in arguments])
        except SystemExit as end:
            return Outcome(int(end.code or 0), out.getvalue(), err.getvalue())


class BatchNormTrunk(nn.Module):
    """A trunk whose output depends on the mode, as many pretrained encoders have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, kernel_size=8, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.norm(self.conv(images_BCHW)).relu()).mean(dim=(2, 3))
