"""What every run folder holds: ``config.yaml``, ``command.txt`` and CSV tables."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import math
import os
import reprlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hubrl.files import DamagedFileError, is_taken

CONFIG_FILE = "config.yaml"
COMMAND_FILE = "command.txt"
LOCK_FILE = ".lock"
#: What to do with a damaged table.
MEND = "put the file back, or move it away to go on without it"


def check_new_run(folder: Path) -> None:
    """
    :raises ValueError: if the folder has files already
    """
    if is_taken(folder):
        raise ValueError(f"run-dir {folder} exists; give another, or continue it by --resume")


def config_file(folder: Path) -> Path:
    """
    The ``config.yaml`` of a run.

    :raises ValueError: if the folder is not that of a run
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} is not the folder of a run: it has no {CONFIG_FILE}")
    return folder / CONFIG_FILE


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


def replace_config(folder: Path, config: str) -> None:
    """Put another ``config.yaml`` in its place, as a whole or not at all."""
    temporary = folder / f".{CONFIG_FILE}.new"
    temporary.write_text(config)
    os.replace(temporary, folder / CONFIG_FILE)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """
    Hold the run's lock for the block.

    :raises ValueError: if another process has it
    """
    with (folder / LOCK_FILE).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is in use by another process: wait for its end, or give another folder"
            ) from None
        yield


def is_held(folder: Path) -> bool:
    """Whether a process holds the run's lock; a folder without one is left as it is."""
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
    """
    Rows of a CSV file; none if it does not exist.

    A last line without its end is left out: the machine stopped while it was written.

    :raises DamagedFileError: if it is no such table; one line
    """
    if not file.exists():
        return []
    try:
        with file.open(encoding="utf-8", newline="") as text:
            lines = list(text)
        is_cut = bool(lines) and not lines[-1].endswith(("\n", "\r"))
        rows = list(csv.DictReader(lines[:-1] if is_cut else lines))
    except (UnicodeDecodeError, csv.Error):
        raise DamagedFileError(f"{file} is no CSV table: {MEND}") from None
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise DamagedFileError(f"{file}: row {number} has not one cell for each column: {MEND}")
    if is_cut:
        print(f"{file}: its last line has no end and is left out", file=sys.stderr)
    return rows


def cell_number(row: Mapping[str, str], column: str, file: Path) -> float:
    """
    A cell of a row as a number.

    :param file: where the row is from
    :raises DamagedFileError: if it is none; one line
    """
    try:
        value = float(row[column])
        if math.isfinite(value):
            return value
    except (KeyError, ValueError):
        pass
    found = reprlib.repr(row.get(column))
    raise DamagedFileError(f"{file} has {found} as {column}, allowed: a number; {MEND}")


class CsvTable:
    """
    A CSV file that rows are appended to; a new column rewrites it.

    :param file: may exist
    :param step_column: holds agent steps
    :param timesteps: existing rows after this step are dropped; ``last_row`` is the last one that
        stays, empty without any, and ``last_step`` its step, 0 without any
    :raises DamagedFileError: if the file is no such table; one line
    """

    def __init__(self, file: Path, step_column: str, timesteps: int) -> None:
        self._file = file
        self._columns: list[str] = []
        found = [(cell_number(row, step_column, file), row) for row in read_rows(file)]
        kept = [(step, row) for step, row in found if step <= timesteps]
        rows = [row for _, row in kept]
        self.last_step = int(max((step for step, _ in kept), default=0))
        self.last_row = rows[-1] if rows else {}
        if rows:
            self._columns = list(rows[0])
            self._rewrite(rows)
        else:
            self._file.unlink(missing_ok=True)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write rows; missing columns stay empty."""
        columns = dict.fromkeys(column for row in rows for column in row)
        new = [column for column in columns if column not in self._columns]
        if new:
            before = read_rows(self._file) if self._columns else []
            self._columns += new
            self._rewrite(before)
        with self._file.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerows(rows)

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        temporary = self._file.with_suffix(".new")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self._file)
