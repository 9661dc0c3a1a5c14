"""A run that was stopped and resumed ends with the bytes of one that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_runs import SMALL_OF, write_small_config

from hubrl import train
from hubrl.files import file_sha256


def finals(folder: Path) -> dict[str, str]:
    """Hashes of all tensors that a run ended with: weights, optimizers, places, random states."""
    files = sorted((folder / "checkpoints" / "last").glob("*.safetensors"))
    assert {"policy.safetensors", "run.safetensors"} <= {file.name for file in files}
    return {file.name: file_sha256(file) for file in files}


def run(*args: object) -> int:
    """The command's exit code."""
    result = CliRunner().invoke(train.command, list(map(str, args)), standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.return_value


def stop_at(timesteps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopper(train.ProgressCallback):
        def _on_step(self) -> bool:
            if timesteps and self.num_timesteps >= timesteps[0]:
                timesteps.pop(0)
                os.kill(os.getpid(), signal.SIGTERM)
            return True

    monkeypatch.setattr(train, "ProgressCallback", Stopper)


@pytest.mark.parametrize("hub", ["none", "hub5"])
@pytest.mark.parametrize("algorithm", SMALL_OF)
def test_every_algorithm(
    algorithm: str, hub: str, hub5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = str(hub5) if hub == "hub5" else hub
    config = write_small_config(
        tmp_path / "c.yaml", algorithm, hub__name=name, train__n_timesteps=200
    )
    assert run("--config", config, "--run-dir", "whole") == 0
    stop_at([50, 100, 171], monkeypatch)
    assert run("--config", config, "--run-dir", "cut") == 143
    assert [run("--resume", "cut") for _ in range(3)] == [143, 143, 0]
    assert finals(Path("cut")) == finals(Path("whole"))
