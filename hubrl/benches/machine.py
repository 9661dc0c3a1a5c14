"""The machine that something is measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from hubrl.precision import fast_dtype


def machine(device: str) -> dict[str, Any]:
    """
    What the figures depend on.

    :param device: that networks run on
    """
    model = [
        line.split(":")[1].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if "cuda" in device else device,
        "precision": str(fast_dtype(torch.device(device).type)).removeprefix("torch."),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
