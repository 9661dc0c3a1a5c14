"""Fixtures of all rooms: hubs in temporary folders."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hugging_face import Service, serve
from small_hubs import BatchNormTrunk, nature_spec, write_hub

from hubrl.architectures import ARCHITECTURES, Architecture
from hubrl.specs import EncoderSpec

# Each core runs tests of its own; threads of small networks would only wait for each other, those
# of processes that tests start, too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test cuts the power, and waiting for the disk takes a twentieth of all. Processes that tests
# start do wait.
os.fsync = lambda descriptor: None  # type: ignore[assignment]


def pytest_collection_finish() -> None:
    """What was imported stays: a collection need not look at it, and costs a hundredth."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def hub5(tmp_path: Path) -> Path:
    """Folder of a hub of five encoders for (4, 36, 36) images."""
    return write_hub(tmp_path / "hub5", [nature_spec(name) for name in "abcde"])


@pytest.fixture
def batch_norm_architecture(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an architecture with BatchNorm and dropout; 8 features."""
    build = Architecture(lambda spec: BatchNormTrunk(spec.channels))
    monkeypatch.setitem(ARCHITECTURES, "batch_norm", build)
    return "batch_norm"


@pytest.fixture
def mixed_hub(tmp_path: Path, batch_norm_architecture: str) -> Path:
    """Folder of a hub whose encoders differ in architecture, size, channels and features_dim."""
    rgb = EncoderSpec(
        name="rgb",
        architecture=batch_norm_architecture,
        features_dim=8,
        image_size=(24, 20),
        channels=3,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.1),
        frames="last",
        license="MIT",
        source="random numbers",
    )
    grey = dataclasses.replace(
        rgb, name="grey", channels=4, mean=(0.0,), std=(1.0,), frames="stack"
    )
    specs = [nature_spec("conv"), nature_spec("cnn", 44, "nature_cnn"), rgb, grey]
    return write_hub(tmp_path / "mixed", specs)


@pytest.fixture
def hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service on this machine, which huggingface_hub takes for Hugging Face."""
    with serve(monkeypatch, tmp_path / "cache") as service:
        yield service
