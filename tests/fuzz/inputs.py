"""
One promise for each kind of bad input: it is taken, or refused by an error that becomes one line.

``KINDS`` has the checks by kind; each tries one input in the sandbox, and says if it was taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from fuzz import commands, valid
from fuzz.sandbox import BrokenPromiseError, Sandbox
from small_runs import small_config, small_env
from stable_baselines3.common.vec_env import VecEnv

import agents.config
import agents.zips
import hubrl.studies.config
import vision_tasks.config
from agents.checkpoints import Checkpoint
from agents.runs import default_run_dir
from hubrl import cli, evaluate, hubs, train
from hubrl.encoders import build_encoder, golden_features
from hubrl.files import file_sha256
from hubrl.sharing import pull
from hubrl.sources import Wishes, from_file, from_sb3
from hubrl.specs import HUB_FILE, load_hub
from hubrl.state_folder import MANIFEST_FILE, load_parts, read_state
from vision_tasks import classification, report
from vision_tasks.training import RESULTS_FILE

#: Python's own words, which tell a user neither the file nor the fix.
INTERNAL = re.compile(
    r"^(not enough values|too many values|invalid literal|could not convert string|math domain|"
    r"dictionary update|substring not found|embedded null|cannot convert float|zip\(\) argument)|"
    r"Exceeds the limit \(\d+ digits\)"
)


#: Kind of input -> its check.
KINDS: dict[str, Callable[[bytes], bool]] = {}


def _kind(check: Callable[[bytes], bool]) -> Callable[[bytes], bool]:
    """A check that begins in an empty folder."""

    @functools.wraps(check)
    def begun(data: bytes) -> bool:
        for path in _inside().iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return check(data)

    KINDS[check.__name__.removeprefix("check_")] = begun
    return begun


@_kind
def check_agent_config(data: bytes) -> bool:
    """The configuration of an agent; what is taken reads back as it was."""
    return _reads_back(agents.config.load_config, agents.config.dump_config, data)


@_kind
def check_image_config(data: bytes) -> bool:
    """The configuration of an image task; what is taken reads back as it was."""
    return _reads_back(vision_tasks.config.load_config, vision_tasks.config.dump_config, data)


@_kind
def check_study(data: bytes) -> bool:
    """A study, and the configurations of its first runs."""

    def read(file: Path) -> None:
        study = hubrl.studies.config.load_study(file)
        for run in study.runs()[:3]:
            study.run_config(run)

    _written("ppo.yaml", valid.ppo_config())
    return _check(lambda: read(_written("study.yaml", data)))


@_kind
def check_hub_card(data: bytes) -> bool:
    """A hub's folder with foreign cards: shown, built, and checked by the command."""

    def read(folder: Path) -> None:
        hub = load_hub(folder)
        run_dir = default_run_dir(small_config(overrides={"hub.name": str(folder)}))
        assert run_dir.resolve().parent == Path("runs").resolve()
        for spec in hub.encoders:
            golden_features(build_encoder(hub, spec))

    folder = _hub_folder("hub", data)
    _check_command(hubs.command, "hubrl hubs", ["show", str(folder)])
    _check_command(hubs.command, "hubrl hubs", ["check", str(folder)])
    return _check(lambda: read(folder))


@_kind
def check_shared_hub(data: bytes) -> bool:
    """A hub that is pulled from a folder."""

    def read() -> None:
        hub = pull("./shared", Path("mine"))
        for spec in hub.encoders:
            path = hub.weights_path(spec)
            assert path is None or path.resolve().is_relative_to(Path("mine").resolve())

    _hub_folder("shared", data)
    return _check(read)


@_kind
def check_weight_file(data: bytes) -> bool:
    """A weight file whose card tells its sha256, and the same added to a hub."""
    file = _hub_folder("hub", valid.hub_cards()[0]) / "a.safetensors"
    file.write_bytes(valid.weight_file(data))

    def read() -> None:
        hub = load_hub(file.parent)
        spec = dataclasses.replace(hub.encoders[0], sha256=file_sha256(file))
        build_encoder(hub, spec)

    was_taken = _check(read)
    wishes = Wishes(license="MIT", architecture="nature_conv")
    return _check(lambda: from_file(file, wishes)) or was_taken


@_kind
def check_checkpoint(data: bytes) -> bool:
    """A checkpoint with a foreign file; the first byte says which, and if the manifest knows it."""
    data = data or b"\0"
    name, knows = valid.CHECKPOINT_FILES[data[0] % 8 % 5], data[0] >= 128
    folder = _inside() / "last"
    for known, content in valid.checkpoint_files().items():
        _written(f"last/{known}", data[1:] if known == name else content)
    if knows and name != MANIFEST_FILE:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
        manifest[name] = hashlib.sha256(data[1:]).hexdigest()
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest))

    def read() -> None:
        read_state(folder, Checkpoint)
        load_parts(valid.parts(), folder)

    return _check(read)


@_kind
def check_agent_run(data: bytes) -> bool:
    """
    A run's folder with a foreign file that its manifest knows: an encoder of it is added to a hub,
    its agent is evaluated, and it is gone on with.
    """
    kind, n = data[0] if data else 0, len(valid.RUN_ALGORITHMS)
    name = valid.AGENT_RUN_FILES[kind // n % len(valid.AGENT_RUN_FILES)]
    _run_folder(valid.agent_run(valid.RUN_ALGORITHMS[kind % n]), name, data[1:])
    added = ["add", "mine", "--from-run", "run:b"]
    is_added = _check_command(hubs.command, "hubrl hubs", added) == 0
    arguments = ["run", "--episodes", "1", "--checkpoint", "last"]
    # Before a run that goes on has replaced the checkpoint.
    is_played = _check_command(evaluate.command, "hubrl evaluate", arguments) == 0
    is_resumed = _check_command(train.command, "hubrl train", ["--resume", "run"]) == 0
    return is_resumed and is_played and is_added


@_kind
def check_image_run(data: bytes) -> bool:
    """The same of an image task: gone on with, and reported."""
    name = valid.IMAGE_RUN_FILES[(data[0] if data else 0) % len(valid.IMAGE_RUN_FILES)]
    _run_folder(valid.image_run(), name, data[1:])
    with commands.without_pictures():
        is_told = _check_command(report.command, "report", ["run"]) == 0
        (_inside() / "run" / RESULTS_FILE).unlink()
        resume = ["--resume", "run"]
        return _check_command(classification.command, "classification", resume) == 0 and is_told


@_kind
def check_agent_zip(data: bytes) -> bool:
    """A zip of SB3 with a foreign part; the first byte says which."""
    file = _written("agent.zip", valid.agent_zip(data))
    for path, content in valid.agent_hub().items():
        _written(path, content)

    def play() -> None:
        agents.zips.hub_of(file)
        agents.zips.rebuild(file, "ppo", _games())

    was_taken = _check(lambda: from_sb3(file, Wishes(license="MIT")))
    return _check(play) or was_taken


@_kind
def check_arguments(data: bytes) -> bool:
    """A command line, its words ended by NUL; commands stop where their work would begin."""
    words = [commands.harmless(os.fsdecode(word)) for word in data.split(b"\0")]
    name, arguments = words[0], words[1:]
    if name not in commands.COMMANDS:
        name = "hubrl"
    for path, content in commands.files().items():
        _written(path, content)
    with commands.without_work():
        may_connect = commands.asks_for_network(arguments)
        command = commands.COMMANDS[name]
        return _check_command(command, name, arguments, may_connect=may_connect) == 0


_sandbox: Sandbox | None = None


def use_sandbox(root: Path) -> None:
    """All inputs that follow are tried below this folder."""
    global _sandbox
    _sandbox = Sandbox(root)
    torch.set_num_threads(1)


def _current() -> Sandbox:
    assert _sandbox is not None, "call use_sandbox first"
    return _sandbox


def _inside() -> Path:
    return _current().inside


def _written(name: str, data: bytes) -> Path:
    file = _inside() / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return file


def _hub_folder(name: str, cards: bytes) -> Path:
    for file, content in valid.weight_files().items():
        _written(f"{name}/{file}", content)
    return _written(f"{name}/{HUB_FILE}", cards).parent


def _run_folder(files: dict[str, bytes], name: str, content: bytes) -> None:
    """A run with another file; the manifest beside it, if there is one, knows it."""
    for known, was in files.items():
        _written(known, content if known == name else was)
    manifest_file = _inside() / Path(name).parent / MANIFEST_FILE
    if manifest_file.exists():
        manifest = json.loads(manifest_file.read_bytes())
        manifest[Path(name).name] = hashlib.sha256(content).hexdigest()
        manifest_file.write_text(json.dumps(manifest))


def _reads_back(load: Callable[[Path], Any], dump: Callable[[Any], str], data: bytes) -> bool:
    """Whether a configuration is taken; then it is the same after being written and read again."""

    def read(file: Path) -> None:
        config = load(file)
        file.write_text(dump(config))
        assert load(file) == config

    return _check(lambda: read(_written("config.yaml", data)))


def _check(read: Callable[[], None]) -> bool:
    """Whether it was taken; anything but a plain refusal is a broken promise."""
    try:
        with _current().watch():
            read()
    except (ValueError, OSError, click.UsageError) as error:
        _check_message(str(error))
        return False
    return True


def _check_command(
    command: click.Command, name: str, arguments: list[str], *, may_connect: bool = False
) -> int:
    """Its exit code; each line of a refusal says what is wrong in printable text."""
    code = 0
    with _captured() as texts:
        try:
            with _current().watch(may_connect=may_connect):
                cli.run(command, name, arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        except commands.WorkBeginsError:
            return 0
    out, err = texts
    # What the user wrote may be shown as it is; what files hold may not.
    shown = err if any(map(_is_control, "".join(arguments))) else out + err
    if any(map(_is_control, shown)):
        raise BrokenPromiseError(f"not printable: {shown!r}")
    # `hubs check` has a line for each encoder.
    _check_refusal(code, err, has_many=command is hubs.command)
    return code


def _check_refusal(code: int, err: str, *, has_many: bool) -> None:
    lines = err.removesuffix("\n").split("\n")
    if code == 2 and not has_many:
        # Before the refusal may stand what was noticed on the way there.
        notes, lines = lines[:-1], lines[-1:]
        if any("error: " in note for note in notes):
            raise BrokenPromiseError(f"not one line: {err!r}")
    if code == 1:  # a run that diverged says more
        lines = [line for line in lines if "error: " in line]
    for line in lines if code in (1, 2) else ():
        _check_message(line.partition("error: ")[2])


def _is_control(char: str) -> bool:
    return unicodedata.category(char) == "Cc" and char not in "\n\t"


def _check_message(text: str) -> None:
    if not text.strip() or INTERNAL.search(text):
        raise BrokenPromiseError(f"the refusal tells a user nothing: {text!r}")


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """What is printed to a terminal that knows UTF-8 alone; it is there at the end."""
    texts: list[str] = []
    errors = ("strict", "backslashreplace")  # as Python's own
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", error) for error in errors]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield texts
    for stream in streams:
        stream.seek(0)
        texts.append(stream.read())


@functools.cache
def _games() -> VecEnv:
    return small_env()
