"""
``make fuzz``: bad inputs of all kinds by the thousand, guided by the lines of code that they reach.

``python -m fuzz.drive N [FOLDER]`` tries N inputs in all, each kind in a process of its own, as
many at once as there are cores, writes ``figures.csv`` to the folder, and exits with 1 if a promise
was broken. The inputs lie there, too:
``inputs.use_sandbox(NEW_FOLDER)`` and ``inputs.KINDS[KIND](DATA)`` try one again.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import hashlib
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from typing import NamedTuple

import atheris

# As `hubrl train` does: oneDNN keeps a kernel for each size of image and layer that it has seen.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")

with atheris.instrument_imports(include=["hubrl", "agents", "vision_tasks"]):
    from fuzz import inputs, mutations, valid

FOLDER = Path("runs", "fuzz")
FIGURES_FILE = "figures.csv"
MAX_LENGTH = 2**20
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
HANG_SECONDS = 120  # of the clock: code outside Python doesn't hear of the sandbox's limit
MAX_FAILURES = 20
TRAINING = ("agent_run", "image_run")  # kinds that take longest, and so begin first


class Figures(NamedTuple):
    """What was tried of a kind."""

    kind: str
    inputs: int
    accepted: int
    refused: int
    broken: int
    seconds: float
    slowest_ms: float
    peak_mb: float


class Fuzzing:
    """The inputs of one kind; libFuzzer never returns, so that the last one ends the process."""

    def __init__(self, kind: str, n_inputs: int, folder: Path) -> None:
        self._kind, self._n_inputs, self._folder = kind, n_inputs, folder
        self._seeds = valid.SEEDS[kind]()
        self._counts = {True: 0, False: 0}
        self._failures: dict[str, Path] = {}
        self._n_broken, self._slowest = 0, 0.0
        self._start = time.perf_counter()

    def run(self) -> None:
        with tempfile.TemporaryDirectory(dir=memory_folder(), prefix="hubrl-fuzz-") as temporary:
            inputs.use_sandbox(Path(temporary, "sandbox"))
            corpus = Path(temporary, "corpus")
            corpus.mkdir()
            for i, data in enumerate(self._seeds):
                (corpus / str(i)).write_bytes(data)
            self._temporary = temporary
            options = [
                str(corpus), f"-artifact_prefix={self._folder}/{self._kind}-", "-rss_limit_mb=0",
                f"-timeout={HANG_SECONDS}", f"-max_len={MAX_LENGTH}", "-len_control=0", "-seed=1",
                "-verbosity=0", "-mutate_depth=2",
            ]  # fmt: skip
            # What was imported stays: so Python looks often for what an input leaves in cycles.
            gc.collect()
            gc.freeze()
            atheris.Setup([sys.argv[0], *options], self._try, custom_mutator=self._mutate)
            atheris.Fuzz()

    def _try(self, data: bytes) -> None:
        start = time.perf_counter()
        try:
            self._counts[inputs.KINDS[self._kind](data)] += 1
        except Exception as error:
            self._n_broken += 1
            self._note(error, data)
        self._slowest = max(self._slowest, time.perf_counter() - start)
        is_over = self._n_broken + sum(self._counts.values()) >= self._n_inputs
        if is_over or len(self._failures) >= MAX_FAILURES:
            self._end()

    def _note(self, error: Exception, data: bytes) -> None:
        """The first input of each broken promise is kept."""
        frames = traceback.extract_tb(error.__traceback__)
        ours = [
            f for f in frames if "/fuzz/" not in f.filename and "site-packages" not in f.filename
        ]
        line = f"{ours[-1].filename}:{ours[-1].lineno}" if ours else ""
        what = f"{type(error).__name__} {line} {'' if line else str(error)[:40]}"
        if what not in self._failures:
            name = f"{self._kind}-{hashlib.sha256(data).hexdigest()[:12]}"
            self._failures[what] = self._folder / name
            self._failures[what].write_bytes(data)
            report = "".join(traceback.format_exception(error, limit=-8))
            print(f"BROKEN: {self._folder / name}\n{report}", file=sys.stderr, flush=True)

    def _mutate(self, data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        # Most of what libFuzzer keeps is refused, and so is all that is made of it.
        if random.random() < 0.5:
            data = random.choice(self._seeds)
        if random.random() < 0.7:
            try:
                return mutations.mutated(self._kind, data, random)[:max_size]
            except ValueError:
                pass
        return bytes(atheris.Mutate(data, max_size))

    def _end(self) -> None:
        seconds = time.perf_counter() - self._start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        n_inputs = self._n_broken + sum(self._counts.values())
        figures = Figures(
            self._kind, n_inputs, self._counts[True], self._counts[False], self._n_broken,
            round(seconds, 1), round(1000 * self._slowest), round(peak),
        )  # fmt: skip
        _write(self._folder / f".{self._kind}.csv", [figures])
        shutil.rmtree(self._temporary, ignore_errors=True)
        sys.stdout.flush()
        os._exit(1 if self._failures else 0)


def memory_folder() -> str | None:
    """Where files are fast; None for the usual place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main(n_inputs: int, folder: Path, kinds: list[str]) -> int:
    """The exit code."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    warnings.simplefilter("ignore")
    # What libFuzzer keeps lies between tensors, whose memory would never be given back.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)
    n_each, rows, is_whole = -(-n_inputs // len(kinds)), [], True
    waiting = sorted(kinds, key=lambda kind: kind not in TRAINING)
    running: dict[int, str] = {}
    while waiting or running:
        while waiting and len(running) < len(os.sched_getaffinity(0)):
            kind = waiting.pop(0)
            running[_started(kind, n_each, folder)] = kind
        process, status = os.wait()
        is_whole &= status == 0
        kind = running.pop(process)
        figures = _taken(folder / f".{kind}.csv")
        rows += figures
        told = f"{kind}: the process ended early; its input is in {folder}"
        print(_line(figures[0]) if figures else told, flush=True)
    _write(folder / FIGURES_FILE, rows)
    print(
        f"{sum(int(row.inputs) for row in rows):,} inputs; figures are in {folder / FIGURES_FILE}"
    )
    return 0 if is_whole else 1


def _started(kind: str, n_inputs: int, folder: Path) -> int:
    """The number of the process that tries them."""
    process = os.fork()
    if process == 0:
        Fuzzing(kind, n_inputs, folder.absolute()).run()
    return process


def _taken(file: Path) -> list[Figures]:
    """What a process left there; nothing if it ended early."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        rows = [Figures(**row) for row in csv.DictReader(lines)]
    file.unlink()
    return rows


def _line(f: Figures) -> str:
    return (
        f"{f.kind:<13} {int(f.inputs):>7,} inputs: {int(f.accepted):>6,} accepted, "
        f"{int(f.refused):>6,} refused, {f.broken} broken; {float(f.seconds):.0f} s, slowest "
        f"{f.slowest_ms} ms, peak {f.peak_mb} MB"
    )


def _write(file: Path, rows: list[Figures]) -> None:
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(Figures._fields)
        writer.writerows(rows)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.exit(
        main(
            int(arguments[0]) if arguments else 100_000,
            Path(arguments[1]) if arguments[1:] else FOLDER,
            arguments[2:] or list(inputs.KINDS),
        )
    )
