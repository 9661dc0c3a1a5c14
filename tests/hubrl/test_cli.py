"""Commands: exit codes, one line for the user's mistakes, and no foreign modules."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from hubrl import cli
from hubrl.__main__ import group

REPOSITORY = Path(cli.__file__).resolve().parents[1]


@click.command()
@click.option("--number", type=int)
@click.option("--fail")
def command(number: int | None, fail: str | None) -> int:
    if fail == "abort":
        raise KeyboardInterrupt
    with cli.user_errors():
        if fail == "set-up":
            raise ValueError("two\n lines")
        if fail == "file":
            raise FileNotFoundError(2, "No such file", "x.yaml")
    if fail == "bug":
        raise ValueError("a bug")
    return number or 0


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as exit:
        cli.run(command, "hubrl test", list(args))
    return exit.value.code, capsys.readouterr().err


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys) == (0, "")
    assert run(capsys, "--number", "143") == (143, "")
    assert run(capsys, "--fail", "set-up") == (2, "hubrl test: error: two lines\n")
    code, error = run(capsys, "--fail", "file")
    assert code == 2
    assert "No such file: 'x.yaml'" in error
    assert run(capsys, "--fail", "abort")[0] == 130
    with pytest.raises(ValueError, match="a bug"):
        cli.run(command, "hubrl test", ["--fail", "bug"])


def test_what_a_terminal_would_obey_is_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "\x1b[2J\u202e\udcff") == (
        2,
        "hubrl test: error: Got unexpected extra argument (\\x1b[2J\\u202e\\udcff)\n",
    )


def test_names_that_are_no_text_can_be_printed() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8")
    shows = click.Command("x", callback=lambda: print("\udcff"))
    with contextlib.redirect_stdout(stream), pytest.raises(SystemExit):
        cli.run(shows, "hubrl test", [])
    stream.seek(0)
    assert stream.read() == "\\udcff\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--number", "x"], "Invalid value for '--number': 'x' is not a valid integer."),
        (["y"], "Got unexpected extra argument (y)"),
    ],
)
def test_usage_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert run(capsys, *args) == (2, f"hubrl test: error: {message}\n")


def test_an_unknown_option_gets_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    code, error = run(capsys, "--nunber", "1")
    assert code == 2
    assert error.startswith("hubrl test: error: No such option")
    assert "--number" in error
    assert error.count("\n") == 1


def test_unknown_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.run(group, "hubrl", ["trian"])
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("hubrl: error: no such command 'trian' (closest: train), commands: ")
    assert error.count("\n") == 1


def test_help_lists_all_commands_without_importing_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(SystemExit) as exit:
        cli.run(group, "hubrl", ["--help"])
    assert exit.value.code == 0
    output = capsys.readouterr().out
    for name in ("train", "evaluate", "export", "pretrain", "hubs", "bench"):
        assert f"  {name} " in output


def test_our_own_modules_are_accepted() -> None:
    cli.refuse_foreign_modules("agents", "envs")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("envs.py", "hubrl.train --help"),
        ("envs.py", "hubrl.hubs rank atari5 --env ALE/Pong-v5"),
        pytest.param("agents/__init__.py", "hubrl.train --help", marks=pytest.mark.slow),
    ],
)
def test_a_foreign_module_is_refused(tmp_path: Path, name: str, command: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    result = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    module = name.partition("/")[0].removesuffix(".py")
    assert result.stderr.startswith(f"hubrl: error: module '{module}' is {tmp_path / name}, which")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name.partition("/")[0]]
