"""Devices, and the number format, found by a probe, and layout that run fastest on one."""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor
from torch.nn import functional as F

# Below this gain the rounding of bfloat16 is not worth it; some CPUs are 80 times slower in it.
MIN_SPEED_UP = 1.3
#: Shapes of the weights, and strides. All of them, since one alone may mislead: on two threads of a
#: CPU where they gain 1.8 in bfloat16, the second gains 1.1 without a gradient of its input.
NATURE_CONVOLUTIONS = (((32, 4, 8, 8), 4), ((64, 32, 4, 4), 2), ((64, 64, 3, 3), 1))


def check_device(argument: str, name: str) -> torch.device:
    """
    The device of this name, ``auto`` for a GPU where there is one; a GPU with its index.

    :param argument: what the user set, for the message
    :raises ValueError: if this machine has no such device
    """
    try:
        is_gpu = name == "auto" and torch.cuda.is_available()
        device = torch.device({"auto": "cuda" if is_gpu else "cpu"}.get(name, name))
        numbers = torch.zeros(1, device=device)
        numbers.item()  # the meta device has none
        return numbers.device
    except (RuntimeError, AssertionError):
        n_gpus = torch.cuda.device_count()
        allowed = ["auto", "cpu", "cuda"][: 3 if n_gpus else 2]
        allowed += [f"cuda:{index}" for index in range(n_gpus)]
        raise ValueError(
            f"{argument} is {name!r}, allowed on this machine: {', '.join(allowed)}"
        ) from None


def resolve_precision(precision: str, device: torch.device | str) -> torch.dtype:
    """
    The format that encoders compute in; weights, generator and features stay float32.

    :param precision: ``float32``, ``bfloat16``, or ``auto`` for the faster one on this device
    """
    if precision == "auto":
        return fast_dtype(torch.device(device).type)
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def check_precision(precision: str) -> str:
    """
    The same name, if it is one.

    :raises ValueError: if ``precision`` is none of auto, float32, bfloat16
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision is {precision!r}, allowed: auto, float32, bfloat16")
    return precision


def fast_layout(images_or_weights: Tensor) -> torch.memory_format:
    """
    How pixels and weights of a large network lie: by channels on a CPU, in planes elsewhere.

    Convolutions of libraries' models take two thirds of the time so.
    """
    is_on_cpu = images_or_weights.device.type == "cpu"
    return torch.channels_last if is_on_cpu else torch.contiguous_format


def nature_layout(images_BCHW: Tensor, is_learning: bool) -> torch.memory_format:
    """
    The same for NatureCNN: by channels only where a CPU computes its first gradient in float32.

    That takes a quarter of the time so on a CPU with AVX2 alone. Nothing else gains.

    :param is_learning: whether it learns from the images, now or in the update of this rollout
    """
    if images_BCHW.dtype == torch.float32 and is_learning:
        return fast_layout(images_BCHW)
    return torch.contiguous_format


@functools.cache
def fast_dtype(device_type: str) -> torch.dtype:
    """bfloat16 where NatureCNN's convolutions are 1.3 times as fast in it, else float32."""
    if device_type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_fast else torch.float32
    slow, fast = _probe(torch.float32), _probe(torch.bfloat16)
    return torch.bfloat16 if slow / fast >= MIN_SPEED_UP else torch.float32


@torch.inference_mode(False)
@torch.enable_grad()  # the first to ask may be a rollout, which computes without
def _probe(dtype: torch.dtype) -> float:
    """Best of five: seconds for NatureCNN's convolutions of 16 images, forward and backward."""
    # Constants: the probe must not move the run's random numbers.
    images_BCHW = torch.ones(16, 4, 84, 84, dtype=dtype)
    weights = [torch.full(shape, 0.01, requires_grad=True) for shape, _ in NATURE_CONVOLUTIONS]
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        maps_BCHW = images_BCHW
        for weight, (_, stride) in zip(weights, NATURE_CONVOLUTIONS, strict=True):
            maps_BCHW = F.conv2d(maps_BCHW, weight.to(dtype), stride=stride).relu()
        maps_BCHW.sum().backward()
        best = min(best, time.perf_counter() - start)
    return best
