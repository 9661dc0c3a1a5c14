"""The folder of a run: configuration, command, checkpoints, TensorBoard events, CSV files."""

from __future__ import annotations

import csv
import os
import shlex
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import (
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
    filter_excluded_keys,
)
from torch.utils.tensorboard import SummaryWriter

from agents.config import RunConfig, dump_config, parse_config, read_mapping, with_later_keys
from hubrl.specs import load_hub

CONFIG_FILE = "config.yaml"
COMMAND_FILE = "command.txt"
PROGRESS_FILE = "progress.csv"
EVALUATIONS_FILE = "evaluations.csv"
EPISODES_FILE = "episodes.csv"


def default_run_dir(config: RunConfig) -> Path:
    """
    ``runs/<algo>-<env>-<hub>-s<seed>-<timestamp>``.

    :raises ValueError: if there is no such hub
    """
    env = config.env.id.removeprefix("ALE/").replace("/", "_")
    hub = "none" if config.hub.name == "none" else load_hub(config.hub.name).name
    hub = hub.replace(":", "_") + ("-random" if config.hub.random_init else "")
    now = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs", f"{config.algorithm.name}-{env}-{hub}-s{config.train.seed}-{now}")


def check_new_run(folder: Path) -> None:
    """
    :raises ValueError: if the folder has files already
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"run-dir {folder} exists; give another, or continue it by --resume")


def create_run(folder: Path, config: RunConfig) -> None:
    """
    Make the folder with the resolved configuration.

    :raises ValueError: if another command has made it in the meantime
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / CONFIG_FILE).open("x") as file:
            file.write(dump_config(config))
    except FileExistsError:
        raise ValueError(f"run-dir {folder} was made by another command; give another") from None


def note_command(folder: Path) -> None:
    """Add the exact command of this process to ``command.txt``."""
    with (folder / COMMAND_FILE).open("a") as file:
        file.write(shlex.join(sys.orig_argv) + "\n")


def open_run(folder: Path) -> RunConfig:
    """
    The configuration of a run.

    :raises ValueError: if the folder is not that of a run
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no {CONFIG_FILE}")
    return parse_config(with_later_keys(read_mapping(folder / CONFIG_FILE)))


def checkpoint_dir(folder: Path, name: str) -> Path:
    """
    :param name: ``last`` or ``best``
    """
    return folder / "checkpoints" / name


def derive_seed(seed: int, purpose: str, timesteps: int = 0) -> int:
    """
    A seed of its own for each purpose, 0..2^32-1.

    :param seed: of the run
    :param timesteps: where a run was resumed
    """
    sequence = np.random.SeedSequence((seed, zlib.crc32(purpose.encode()), timesteps))
    return int(sequence.generate_state(1)[0])


def make_logger(folder: Path, timesteps: int) -> Logger:
    """
    SB3's logger, writing ``progress.csv`` and TensorBoard events.

    :param timesteps: a resumed run starts here; what was logged after it is dropped
    """
    return Logger(str(folder), [_ProgressCsv(folder, timesteps), _Events(folder, timesteps)])


def read_rows(file: Path) -> list[dict[str, str]]:
    """Rows of a CSV file; none if it does not exist."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


class CsvTable:
    """
    A CSV file that rows are appended to; a new column rewrites it.

    :param file: may exist
    :param step_column: holds agent steps
    :param timesteps: existing rows after this step are dropped; ``last_row`` is the last one that
        stays, empty without any, and ``last_step`` its step, 0 without any
    """

    def __init__(self, file: Path, step_column: str, timesteps: int) -> None:
        self._file = file
        self._columns: list[str] = []
        rows = [row for row in read_rows(self._file) if int(row[step_column]) <= timesteps]
        self.last_step = max((int(row[step_column]) for row in rows), default=0)
        self.last_row = rows[-1] if rows else {}
        if rows:
            self._columns = list(rows[0])
            self._rewrite(rows)
        else:
            self._file.unlink(missing_ok=True)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; missing columns stay empty."""
        new = [column for column in row if column not in self._columns]
        if new:
            rows = read_rows(self._file) if self._columns else []
            self._columns += new
            self._rewrite(rows)
        with self._file.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        temporary = self._file.with_suffix(".new")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self._file)


class _ProgressCsv(KVWriter):
    """SB3's own CSV format starts its file anew, which would lose a resumed run's past."""

    def __init__(self, folder: Path, timesteps: int) -> None:
        self._table = CsvTable(folder / PROGRESS_FILE, "time/total_timesteps", timesteps)

    def write(
        self,
        key_values: dict[str, Any],
        key_excluded: dict[str, tuple[str, ...]],
        step: int = 0,
    ) -> None:
        self._table.append(filter_excluded_keys(key_values, key_excluded, "csv"))

    def close(self) -> None:
        pass


class _Events(TensorBoardOutputFormat):
    def __init__(self, folder: Path, timesteps: int) -> None:
        # SB3's own __init__ takes no purge_step, by which TensorBoard drops what was logged later.
        self._is_closed = False
        self.writer = SummaryWriter(str(folder), purge_step=timesteps or None)
