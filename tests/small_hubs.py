"""Small hubs for all rooms' tests: real weight files of random numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from hubrl.architectures import ARCHITECTURES
from hubrl.encoders import file_sha256
from hubrl.specs import EncoderSpec, HubSpec, save_hub


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


def write_hub(folder: Path, specs: list[EncoderSpec]) -> Path:
    """A hub folder with a weight file for each card."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for seed, spec in enumerate(specs):
        torch.manual_seed(100 + seed)
        trunk = ARCHITECTURES[spec.architecture].build(spec)
        for parameter in trunk.parameters():
            nn.init.normal_(parameter, std=0.1)
        file = folder / f"{spec.name}.safetensors"
        save_file(trunk.state_dict(), file)
        written.append(dataclasses.replace(spec, weights=file.name, sha256=file_sha256(file)))
    save_hub(HubSpec(name=folder.name, encoders=tuple(written)), folder)
    return folder


class BatchNormTrunk(nn.Module):
    """A trunk whose output depends on the mode, as many pretrained encoders have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, kernel_size=8, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.norm(self.conv(images_BCHW)).relu()).mean(dim=(2, 3))
