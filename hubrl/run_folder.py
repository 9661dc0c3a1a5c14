"""What every run folder holds: ``config.yaml``, ``command.txt`` and CSV tables."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.yaml"
COMMAND_FILE = "command.txt"
LOCK_FILE = ".lock"


def check_new_run(folder: Path) -> None:
    """
    :raises ValueError: if the folder has files already
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"run-dir {folder} exists; give another, or continue it by --resume")


def create_folder(folder: Path, config: str) -> None:
    """
    Make the folder with its ``config.yaml``.

    :param config: YAML of the resolved configuration
    :raises ValueError: if another command has made it in the meantime
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / CONFIG_FILE).open("x") as file:
            file.write(config)
    except FileExistsError:
        raise ValueError(f"run-dir {folder} was made by another command; give another") from None


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """
    Inside, no other process is inside with this run.

    :raises ValueError: if one is
    """
    with (folder / LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is in use by another process: wait for its end, or give another run-dir"
            ) from None
        yield


def is_held(folder: Path) -> bool:
    """Whether a process is inside ``held``; a folder without a lock is left as it is."""
    if not (folder / LOCK_FILE).exists():
        return False
    try:
        with held(folder):
            return False
    except ValueError:
        return True


def note_command(folder: Path) -> None:
    """Add the exact command of this process to ``command.txt``."""
    with (folder / COMMAND_FILE).open("a") as file:
        file.write(shlex.join(sys.orig_argv) + "\n")


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
