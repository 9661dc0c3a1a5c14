"""What all commands share: one line for the user's mistakes, exit codes, and our own modules."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import click

from hubrl.run_folder import CONFIG_FILE, held, is_held

#: The place of a run in ``--resume auto``.
AUTO = Path("auto")
SET_HELP = "Another setting of the configuration, in YAML; may be repeated."
RESUME_HELP = "Continue the run in this folder; auto: the same command's unfinished one, if any."


def run(command: click.Command, name: str, args: list[str] | None = None) -> NoReturn:
    """
    Run a command and exit: 0 done, 2 the user's input is wrong (one line), 1 it failed
    with a reason that it knows (one line), 130 interrupted.

    A command exits with another code by ``sys.exit``; any other exception keeps its traceback.

    :param name: how the user called it, such as ``hubrl train``
    :param args: the command line without the name; None: that of the process
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold bytes that are no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = command.main(args, prog_name=name, standalone_mode=False)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        print(f"{name}: error: {_one_line(error.format_message())}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Inside, a ValueError or an OSError is the user's mistake: one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error


@contextlib.contextmanager
def failures(*kinds: type[Exception]) -> Iterator[None]:
    """Inside, exceptions of these kinds end the command with one line and exit code 1."""
    try:
        yield
    except kinds as error:
        raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the run's lock for the block; that another process has it is the user's mistake."""
    with contextlib.ExitStack() as stack:
        with user_errors():
            stack.enter_context(held(folder))
        yield


def refuse_beside_resume(given: Iterable[str]) -> None:
    """
    :param given: names of the other options that the user gave
    :raises ValueError: if there are any
    """
    for name in given:
        option = name.replace("_", "-")
        raise ValueError(f"--{option} and --resume: a resumed run keeps its {CONFIG_FILE}")


def check_output(option: str, file: Path | None) -> None:
    """
    Before a long command that writes a file at its end.

    :raises ValueError: if the file can't be written there; None is none
    """
    if file is None:
        return
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{option} {file}: there is no folder {file.parent}")
    if file.is_dir():
        raise ValueError(f"{option} {file} is a folder: give a file")


def check_output_folder(option: str, folder: Path) -> None:
    """
    The same for a folder, which may have to be made.

    :raises ValueError: if it can't be made or written to
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{option} {folder}: {nearest} is no folder that can be written to")


def run_to_continue(
    run_dir: Path | None, config: str, is_complete: Callable[[Path], bool], *, is_auto: bool
) -> Path | None:
    """
    The unfinished run that the same command began and that shall go on, the newest if several.

    People are asked, scripts are told of it.

    :param run_dir: the only folder to look at; None: all below ``runs``
    :param config: YAML of the resolved configuration, which must be the run's
    :param is_complete: asked of a run's folder
    :param is_auto: don't ask; a given folder that is complete counts, so that a script's command
        may be repeated
    """
    folders = Path("runs").glob("*") if run_dir is None else [run_dir]
    found = _of_config(folders, config)
    if run_dir is None:
        found = [folder for folder in found if not is_held(folder)]
    if run_dir is None or not is_auto:
        found = [folder for folder in found if _is_left(folder, is_complete)]
    if not found or is_auto:
        return found[0] if found else None
    if sys.stdin.isatty():
        is_wanted = click.confirm(f"{found[0]} is unfinished: continue it?", default=True)
        return found[0] if is_wanted else None
    print(f"{found[0]} is an unfinished run like this; --resume auto would continue it")
    return None


def refuse_foreign_modules(*names: str) -> None:
    """
    Exit 2 if another module has the name of one of ours.

    ``python -m`` puts the current folder first on the path, where a user may have an ``envs``.
    """
    ours = Path(__file__).resolve().parents[1]
    for name in names:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin != ours / name / "__init__.py":
            print(
                f"hubrl: error: module {name!r} is {origin}, which hides that of hubrl "
                f"({ours / name}); run the command from another folder, or use `hubrl ...` "
                "instead of `python -m hubrl...`",
                file=sys.stderr,
            )
            sys.exit(2)


def _of_config(folders: Iterable[Path], config: str) -> list[Path]:
    """Runs of a configuration, the newest first."""
    files = [folder / CONFIG_FILE for folder in folders]
    same = [
        file.parent for file in files if file.is_file() and file.read_bytes() == config.encode()
    ]
    return sorted(same, key=lambda folder: folder.stat().st_mtime, reverse=True)


def _is_left(folder: Path, is_complete: Callable[[Path], bool]) -> bool:
    """Whether a run can go on: one whose only checkpoint is damaged can't."""
    try:
        return not is_complete(folder)
    except ValueError:
        return False


def _one_line(text: str) -> str:
    """What a terminal would obey in the place of showing it, such as colours, is written out."""
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
