"""Runs that are killed at random moments and resumed, for the tests of what survives."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from hubrl.files import file_sha256

N_KILLS = 20


def command(folder: Path, module: str, *args: object) -> subprocess.Popen[str]:
    """A command of ours as a process of its own."""
    line = [sys.executable, "-m", module, *map(str, args)]
    return subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, text=True)


def survive(folder: Path, module: str, *args: object) -> None:
    """
    Run once in ``whole``; then in ``cut``, killed ``N_KILLS`` times and resumed, up to its end.

    Every second time on average the kill waits until a checkpoint is being written.
    """
    longest = _seconds(command(folder, module, *args, "--run-dir", "whole")) / 24
    chance, n_in_write = random.Random(0), 0
    process = command(folder, module, *args, "--run-dir", "cut")
    for _ in range(N_KILLS):
        seconds = chance.uniform(longest / 10, longest)
        n_in_write += _kill(process, folder / "cut", seconds, chance.random() < 0.5)
        process = command(folder, module, "--resume", "cut")
    _seconds(process)
    print(f"{module}: killed {N_KILLS} times, {n_in_write} of them inside a checkpoint's write")
    assert n_in_write >= 3


def last_hashes(run: Path) -> dict[str, str]:
    """Of all tensors that a run ended with: weights, optimizers, places, random states."""
    files = sorted((run / "checkpoints" / "last").glob("*.safetensors"))
    return {file.name: file_sha256(file) for file in files}


def _seconds(process: subprocess.Popen[str]) -> float:
    """Of training, up to the end of the command."""
    assert process.stdout is not None
    assert process.stdout.readline().startswith("run folder")
    start = time.monotonic()
    process.communicate()
    assert process.returncode == 0
    return time.monotonic() - start


def _kill(process: subprocess.Popen[str], run: Path, seconds: float, in_write: bool) -> bool:
    """Whether a checkpoint was being written then."""
    assert process.stdout is not None
    start = time.time()
    assert process.stdout.readline().startswith("run folder")
    end = time.monotonic() + seconds
    while time.monotonic() < end or (in_write and not _is_in_write(run, start)):
        assert process.poll() is None, "it ended before it was killed often enough"
        time.sleep(0.0005)
    process.kill()
    process.communicate()
    return _is_in_write(run, start)


def _is_in_write(run: Path, start: float) -> bool:
    """One that an earlier kill left behind doesn't count."""
    try:
        return (run / "checkpoints" / ".last.new").stat().st_mtime > start
    except FileNotFoundError:
        return False
