"""Two processes of half a batch each do what one process does with the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_images import write_rgb_hub

ROOT = Path(__file__).resolve().parents[2]


def one_step(hub: Path, folder: Path, *launcher: str) -> dict[str, torch.Tensor]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(
        [sys.executable, "-P", *launcher, str(ROOT / "tests" / "one_step.py"), hub, folder],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    return load_file(folder / "gradients.safetensors")


@pytest.mark.slow
def test_gradients_are_those_of_the_double_batch(tmp_path: Path) -> None:
    hub = write_rgb_hub(tmp_path / "rgb")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    one = one_step(hub, tmp_path / "one")
    two = one_step(hub, tmp_path / "two", *launcher)
    scores = "model.pathway.generator.scores.weight"
    assert float(one[scores].abs().max()) > 1e-4
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert not (tmp_path / "two" / "checkpoints" / "best").exists()
    assert (tmp_path / "two" / "results.json").exists()
