"""
A long training whose memory, file handles, threads and speed are watched: ``python tests/soak.py``.

It fails if memory grows, handles or threads are left behind, or the training becomes slower.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np

#: Steps between checkpoints: about a minute of PPO on two cores.
SAVE_FREQ = 10_000
#: Seconds between two looks at the process, and looks after a checkpoint that end a sample.
LOOK, N_AFTER = 0.1, 20
#: Of the whole time; until then torch and Python fill their caches.
WARM_UP = 0.2
SAMPLES_FILE = "soak.csv"
#: What is allowed after it.
MAX_SLOPE_MB_PER_HOUR = 1.0
MAX_SLOWER = 0.05


class Sample(NamedTuple):
    """The process from one checkpoint to the next."""

    seconds: float
    memory_mb: float
    """
    Resident memory in the two seconds after the checkpoint, when what is free was given back: the
    median of the looks, since some fall into the moment before it is taken again.
    """
    peak_mb: float
    """The most."""
    n_files: int
    n_threads: int


@click.command()
@click.option("--minutes", type=click.FloatRange(min=5), default=60.0, show_default=True)
@click.option("--hub", default="atari5", show_default=True)
@click.option("--run-dir", type=click.Path(path_type=Path), default="runs/soak", show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where the figures go.")
def command(minutes: float, hub: str, run_dir: Path, file: Path | None) -> None:
    """Train PPO on Breakout for some time, with a checkpoint each 10,000 steps."""
    figures = soak(minutes * 60, hub, run_dir)
    text = json.dumps(figures, indent=1)
    print(text)
    if file is not None:
        file.write_text(text + "\n")
    is_flat = figures["memory_slope_mb_per_hour"] < MAX_SLOPE_MB_PER_HOUR
    is_constant = figures["files_left"] == figures["threads_left"] == 0
    is_steady = figures["speed_end_over_start"] > 1 - MAX_SLOWER
    sys.exit(0 if is_flat and is_constant and is_steady else 1)


def soak(seconds: float, hub: str, run_dir: Path) -> dict[str, float]:
    """
    Train for so long and measure.

    :param seconds: of training
    :param hub: of the agent
    :param run_dir: a new folder
    :return: figures by name
    """
    options = ["--env", "ALE/Breakout-v5", "--hub", hub, "-n", 10**9, "--eval-freq", 0]
    options += ["--save-freq", SAVE_FREQ, "--run-dir", run_dir]
    command = [sys.executable, "-m", "hubrl.train", *map(str, options)]
    samples = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            samples.append(sample(process, start, run_dir / "checkpoints" / "last"))
        process.terminate()
    if process.returncode != 143:
        sys.exit(f"the training ended with {process.returncode}")
    with (run_dir / SAMPLES_FILE).open("w", newline="") as lines:
        csv.writer(lines).writerows([Sample._fields, *samples])
    warm = [each for each in samples if each.seconds > WARM_UP * seconds]
    speeds = speed(run_dir / "progress.csv")
    n_edge = max(len(speeds) // 10, 1)
    return {
        "minutes": round(seconds / 60, 1),
        "memory_mb": round(float(np.median([s.memory_mb for s in warm])), 1),
        "memory_slope_mb_per_hour": slope(warm, [s.memory_mb for s in warm]),
        "memory_slope_standard_error": slope_error(warm, [s.memory_mb for s in warm]),
        "peak_mb": round(float(np.median([s.peak_mb for s in warm])), 1),
        "peak_slope_mb_per_hour": slope(warm, [s.peak_mb for s in warm]),
        "files_left": warm[-1].n_files - warm[0].n_files,
        "threads_left": warm[-1].n_threads - warm[0].n_threads,
        "steps_per_second": round(float(np.median(speeds)), 1),
        "speed_end_over_start": round(
            float(np.median(speeds[-n_edge:]) / np.median(speeds[:n_edge])), 3
        ),
    }


def sample(process: subprocess.Popen[bytes], start: float, checkpoint: Path) -> Sample:
    """What the kernel says of a process, until it has written the next checkpoint."""
    folder, before = Path("/proc", str(process.pid)), _written(checkpoint)
    memory, n_left = [], N_AFTER
    while n_left > 0:
        if process.poll() is not None:
            sys.exit(f"the training ended with {process.returncode}")
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        memory.append(int(status["VmRSS"].split()[0]) / 1024)
        n_left -= _written(checkpoint) != before
        time.sleep(LOOK)
    return Sample(
        time.monotonic() - start,
        float(np.median(memory[-N_AFTER:])),
        max(memory),
        len(os.listdir(folder / "fd")),
        int(status["Threads"]),
    )


def _written(checkpoint: Path) -> int:
    """When; 0 while it is being replaced."""
    try:
        return checkpoint.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def slope(samples: list[Sample], values: list[float]) -> float:
    """By how much they rise in an hour: least squares."""
    return round(float(np.polyfit([s.seconds / 3600 for s in samples], values, 1)[0]), 2)


def slope_error(samples: list[Sample], values: list[float]) -> float:
    """Standard error of ``slope``, in its unit."""
    _, covariance = np.polyfit([s.seconds / 3600 for s in samples], values, 1, cov=True)
    return round(float(np.sqrt(covariance[0, 0])), 2)


def speed(file: Path) -> list[float]:
    """Agent steps per second between the rows of a log, the first row left out."""
    with file.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["time/total_timesteps"]]
    steps = np.array([float(row["time/total_timesteps"]) for row in rows])
    seconds = np.array([float(row["time/time_elapsed"]) for row in rows])
    every = max(len(rows) // 60, 1)  # time is logged in whole seconds
    return list(np.diff(steps[::every]) / np.maximum(np.diff(seconds[::every]), 1.0))


if __name__ == "__main__":
    command()
