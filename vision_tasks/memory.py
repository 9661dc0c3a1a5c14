"""Memory in the supplement's three steps: weights loaded, generator run, models run."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hubrl.origin import same_code
from vision_tasks.costed import (
    MODELS,
    PATHWAY,
    Setup,
    build_model,
    costed_hub,
    predict,
    random_batch,
    spread_routing,
    train_step,
)
from vision_tasks.methods import Method
from vision_tasks.methods.hub_pathway import HubPathwayMethod
from vision_tasks.process_memory import MB, read_memory

# Shape letters: B batch, M encoders to choose from, C H W image.

CLEAR = Path("/proc/self/clear_refs")
ROUNDS = 3
# The C library gives back each block of this size as soon as it is free: what is resident is what
# tensors occupy, not what it keeps for later ones.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}


class Memory(NamedTuple):
    """Megabytes (10^6 bytes) of a model."""

    loaded: float
    """With its weights, before anything ran; on a CPU the libraries' part is in it."""
    generator: float
    """What the generator adds at its peak; 0 where it is none or not told apart."""
    models: float
    """What all else adds to that."""

    @property
    def above_weights(self) -> float:
        """What running takes."""
        return self.generator + self.models

    @property
    def total(self) -> float:
        """At the peak."""
        return self.loaded + self.above_weights


def measure_memory(setup: Setup, mode: str, rounds: int = ROUNDS) -> dict[str, Memory]:
    """
    Peak memory of each of ``MODELS``; on CUDA what torch allocated, on a CPU what is resident.

    Each figure is the median over processes of their own, which load one model and run one step.
    Where a system doesn't tell a process its peak, as Linux does, there are none.

    :param mode: ``training``, a forward and backward pass of a batch without the optimizer, or
        ``inference``
    :param rounds: processes for each figure
    """
    if not (setup.device.startswith("cuda") or CLEAR.exists()):
        return {}
    return {name: _measure(setup, mode, name, rounds) for name in MODELS}


def _measure(setup: Setup, mode: str, name: str, rounds: int) -> Memory:
    wholes = [_run_child(setup, mode, name, "models") for _ in range(rounds)]
    loaded = statistics.median(peak.loaded for peak in wholes)
    whole = statistics.median(peak.above for peak in wholes)
    generator = 0.0
    if name == PATHWAY:
        parts = [_run_child(setup, mode, name, "generator") for _ in range(rounds)]
        generator = statistics.median(peak.above for peak in parts)
    return Memory(loaded / MB, generator / MB, (whole - generator) / MB)


class Peak(NamedTuple):
    """Bytes that a process found."""

    loaded: int
    above: int
    """From there to the peak."""


def _run_child(setup: Setup, mode: str, name: str, step: str) -> Peak:
    """
    This file as a process.

    :raises RuntimeError: if it fails, as for lack of memory
    """
    given = {"setup": setup._asdict(), "mode": mode, "name": name, "step": step}
    done = subprocess.run(
        [sys.executable, "-P", __file__, json.dumps(given)],
        env={**os.environ, **ENVIRONMENT, **same_code()},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{name}, {mode}: exits {done.returncode}: {done.stderr[-2000:]}")
    return Peak(*json.loads(done.stdout.splitlines()[-1]))


def find_peak(setup: Setup, mode: str, name: str, step: str) -> Peak:
    """
    Load a model, run one step of it.

    :param mode: ``training`` or ``inference``
    :param name: one of ``MODELS``
    :param step: ``models`` for all of it, ``generator`` for that alone
    """
    _load_libraries(setup.device)
    method = spread_routing(build_model(costed_hub(setup), setup, name))
    method.train(mode == "training")
    images_BCHW, targets_B = random_batch(setup)
    loaded = _restart_peak(setup.device)
    if step == "generator":
        _generate(method, images_BCHW)
    elif mode == "training":
        train_step(method, images_BCHW, targets_B)
    else:
        predict(method, images_BCHW)
    return Peak(loaded, _peak_bytes(setup.device) - loaded)


def _generate(method: Method, images_BCHW: Tensor) -> None:
    """The generator's part of a step; in training what backward needs is kept."""
    assert isinstance(method, HubPathwayMethod)
    pathway = method.model.pathway
    with torch.set_grad_enabled(method.training):
        shape = (len(images_BCHW), len(pathway.encoders) - len(pathway.always_active))
        noise_BM = torch.randn(shape, device=images_BCHW.device) if method.training else None
        pathway.generator(images_BCHW, noise_BM)


def _load_libraries(device: str) -> None:
    """A small step, whose code and threads shall not count."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(8))
    network.to(device)(torch.rand(4, 3, 16, 16, device=device)).sum().backward()


def _restart_peak(device: str) -> int:
    """Bytes at present; the peak counts from now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    CLEAR.write_text("5")  # proc(5): resets the peak
    return read_memory()["VmRSS"]


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return read_memory()["VmHWM"]


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(find_peak(**given | {"setup": Setup(**given["setup"])})))
