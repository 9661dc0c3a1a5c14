"""Where a result comes from: the command and the commit, for cards and reports."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import click

REPOSITORY = Path(__file__).resolve().parents[1]


def command_line(*words: str) -> str:
    """
    The command of this process as one would type it.

    :param words: what it is called by, such as ``hubrl pretrain``, to which its arguments are added
    """
    arguments = sys.argv[1:]
    context = click.get_current_context(silent=True)
    if context is not None and context.parent is not None:
        arguments = arguments[1:]  # the subcommand's name
    return shlex.join([*words, *arguments])


def same_code() -> dict[str, str]:
    """Environment in which a process imports the code that this one runs, from any folder."""
    path = [str(REPOSITORY), os.environ.get("PYTHONPATH")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def commit() -> str:
    """The git commit of this code, ``-dirty`` with changes; ``unknown`` outside of a clone."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != REPOSITORY:
            return "unknown"  # a user's own, around an installation
        changes = _git("status", "--porcelain", "--", "hubrl", "agents", "envs", "configs")
        return _git("rev-parse", "HEAD")[:12] + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return os.fsdecode(subprocess.run(command, capture_output=True, check=True).stdout).strip()
