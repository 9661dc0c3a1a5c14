"""Checkpoints that survive damage, a full disk and a kill at any moment of their writing."""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import renew_manifest
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from torch import nn
from typing_extensions import TypedDict

from hubrl import state_folder
from hubrl.files import DamagedFileError, write_tensors
from hubrl.state_folder import (
    NotSavedError,
    StoredCount,
    has_state,
    load_parts,
    read_state,
    repair_state,
    save_state,
)


class Numbers(TypedDict):
    number: StoredCount


def layer(value: float) -> nn.Linear:
    made = nn.Linear(8, 8)
    nn.init.constant_(made.weight, value)
    return made


def save(folder: Path, number: int) -> None:
    save_state({"layer": layer(float(number))}, {"number": number}, folder)


def loaded(folder: Path) -> tuple[int, float]:
    part, state = layer(0.0), read_state(folder, Numbers)
    load_parts({"layer": part}, folder)
    return state["number"], float(part.weight.detach()[0, 0])


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))


DAMAGES: list[Callable[[Path], None]] = [truncate, flip_a_bit, Path.unlink]
FILES = ["layer.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_the_checkpoint_before_stands_in_for_a_damaged_one(
    damage: Callable[[Path], None], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "last"
    save(folder, 1)
    save(folder, 2)
    assert loaded(folder) == (2, 2.0)
    damage(folder / name)
    assert read_state(folder, Numbers) == {"number": 1}
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"checkpoint {folder} is damaged (" in error
    assert error.endswith("): the one before, last.1, is read\n")
    assert name in error or name == "manifest.json"
    assert loaded(folder) == (1, 1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"last", "last.1"}, "a look moves nothing"
    capsys.readouterr()
    repair_state(folder)
    assert "last.1, takes its place, and it is kept as last.damaged" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"last", "last.damaged"}
    assert loaded(folder) == (1, 1.0)
    save(folder, 3)
    assert loaded(folder) == (3, 3.0)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES[:2])
def test_the_only_checkpoint_is_damaged(
    damage: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    save(tmp_path / "last", 1)
    damage(tmp_path / "last" / name)
    message = (
        rf"last is damaged \({name} (is missing|has another sha256)\), and no whole one is bef"
    )
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path / "last", Numbers)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "[]", r"damaged \(manifest\.json can't be read\)"),
        ("manifest.json", "[" * 100_000, r"damaged \(manifest\.json can't be read\)"),
        (
            "manifest.json",
            '{"../other": "0"}',
            r"damaged \(manifest\.json names '\.\./other', which is no file in it\)",
        ),
        ("state.json", "3", r"there is no checkpoint in .* \(no readable state\.json\)"),
        ("state.json", "[" * 100_000, "there is no checkpoint in "),
        ("state.json", '{"scalars": [1]}', r"layer\.safetensors can't be loaded"),
        ("state.json", "{}", r"layer\.safetensors can't be loaded"),
        ("state.json", '{"scalars": {"layer": [1]}}', None),
    ],
)
def test_foreign_files_in_a_checkpoint(
    name: str, content: str, message: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "last"
    save(folder, 1)
    (folder / name).write_text(content)
    if name != "manifest.json":
        renew_manifest(folder)
    if message is None:
        load_parts({"layer": layer(0.0)}, folder)
        return
    with pytest.raises(ValueError, match=message):
        load_parts({"layer": layer(0.0)}, folder)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"last/state\.json has no number: put the file back, or do what wrote it again"),
        ({"number": "x"}, r"state\.json has number 'x' \(Input should be a valid integer"),
        (
            {"number": -1},
            r"state\.json has number -1 \(Input should be greater than or equal",
        ),
        (
            {"number": 10**30},
            r"state\.json has number 10+ \(Input should be less than or ",
        ),
        ({"number": 2.5}, r"state\.json has number 2\.5 \(Input should be a valid integer"),
    ],
)
def test_numbers_that_are_missing_or_something_else(
    state: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_state({}, state, tmp_path / "last")
    with pytest.raises(DamagedFileError, match=message):
        read_state(tmp_path / "last", Numbers)


def stepped(cls: type[torch.optim.Optimizer], shape: tuple[int, ...]) -> torch.optim.Optimizer:
    weights = [nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(2))]
    optimizer = cls(weights, lr=0.1)  # type: ignore[call-arg]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    return optimizer


OPTIMIZERS = [torch.optim.Adam, torch.optim.AdamW, RMSpropTFLike]


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_an_optimizer_comes_back(cls: type[torch.optim.Optimizer], tmp_path: Path) -> None:
    saved, loaded = stepped(cls, (3, 2)), cls([torch.ones(3, 2), torch.ones(2)], lr=0.1)  # type: ignore[call-arg]
    save_state({"optimizer": saved}, {}, tmp_path / "last")
    load_parts({"optimizer": loaded}, tmp_path / "last")
    before, after = saved.state_dict()["state"], loaded.state_dict()["state"]
    assert before.keys() == after.keys()
    for index, values in before.items():
        for key, value in values.items():
            assert np.array_equal(np.asarray(value), np.asarray(after[index][key]))


def test_an_optimizer_comes_back_for_weights_that_lie_by_their_channels(tmp_path: Path) -> None:
    """Fused Adam goes through memory, whatever lies where."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    images = torch.rand(2, 4, 9, 9)

    def step(optimizer: torch.optim.Optimizer) -> torch.Tensor:
        optimizer.zero_grad()
        layer(images).square().sum().backward()
        optimizer.step()
        return layer.weight.detach().clone()

    saved = torch.optim.Adam(layer.parameters(), fused=True)
    step(saved)
    save_state({"layer": layer, "optimizer": saved}, {}, tmp_path / "last")
    expected = step(saved)
    loaded = torch.optim.Adam(layer.parameters(), fused=True)
    load_parts({"layer": layer, "optimizer": loaded}, tmp_path / "last")
    assert torch.equal(step(loaded), expected)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (stepped(torch.optim.Adam, (4, 2)), r"0\.exp_avg has another shape than \(3, 2\)"),
        (stepped(RMSpropTFLike, (3, 2)), r"it has square_avg, step, not exp_avg, exp_avg_sq, step"),
    ],
)
def test_the_state_of_another_optimizer(
    saved: torch.optim.Optimizer, message: str, tmp_path: Path
) -> None:
    """torch would take it, and fail in its next step."""
    save_state({"optimizer": saved}, {}, tmp_path / "last")
    optimizer = torch.optim.Adam([torch.ones(3, 2), torch.ones(2)])
    with pytest.raises(DamagedFileError, match=message):
        load_parts({"optimizer": optimizer}, tmp_path / "last")
    fewer = type(saved)([torch.ones(3, 2)], lr=0.1)  # type: ignore[call-arg]
    with pytest.raises(DamagedFileError, match=r"has another shape|of 2 weights or more"):
        load_parts({"optimizer": fewer}, tmp_path / "last")


def test_as_many_checkpoints_stay_as_are_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    for number in range(5):
        save_state({"net": layer(number)}, {"number": number}, folder, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "last.1", "last.2"]
    for name in ("last", "last.1"):
        (tmp_path / name / "net.safetensors").write_bytes(b"")
    assert read_state(folder, Numbers)["number"] == 2
    repair_state(folder)
    assert read_state(folder, Numbers)["number"] == 2


def test_what_is_renamed_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    replace = os.replace

    def replaced(source: Path, target: Path) -> None:
        calls.append(("replace", str(target)))
        replace(source, target)

    def synced(descriptor: int) -> None:
        calls.append(("fsync", os.path.realpath(f"/dev/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    save_state({"net": layer(1)}, {"number": 1}, tmp_path / "last")
    moment = calls.index(("replace", str(tmp_path / "last")))
    new = tmp_path / ".last.new"
    names = ("net.safetensors", "state.json", "manifest.json")
    assert {("fsync", str(path)) for path in (new, *(new / n for n in names))} <= {*calls[:moment]}
    assert calls[moment + 1 :] == [("fsync", str(tmp_path))]


def test_the_manifest_is_what_sha256sum_says(tmp_path: Path) -> None:
    save(tmp_path / "last", 1)
    manifest = json.loads((tmp_path / "last" / "manifest.json").read_text())
    assert set(manifest) == {"layer.safetensors", "state.json"}
    command = ["sha256sum", *sorted(manifest)]
    lines = subprocess.run(command, cwd=tmp_path / "last", capture_output=True, text=True).stdout
    assert {line.split()[1]: line.split()[0] for line in lines.splitlines()} == manifest


def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "last"
    save(folder, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("write_tensors", "_sync"):
        with monkeypatch.context() as patch:
            patch.setattr(state_folder, function, full)
            message = (
                r"last can't be written \(.*No space left on device\); the one before is whole"
            )
            with pytest.raises(NotSavedError, match=message):
                save(folder, 2)
        assert [file.name for file in tmp_path.iterdir()] == ["last"]
        assert loaded(folder) == (1, 1.0)


def test_lengths_that_change_leave_nothing_in_memory(tmp_path: Path) -> None:
    """A run saves its environments' actions, more of them in each checkpoint."""

    def write(n: int) -> None:
        write_tensors({"sent": torch.zeros(n, dtype=torch.int16)}, tmp_path / "x.safetensors")

    write(1)
    tracemalloc.start()
    for n in range(2, 202):
        write(n)
    gc.collect()
    n_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert n_bytes < 20_000  # with 6 kB for each length it would be a million


class KilledError(BaseException):
    """Stands for SIGKILL: no handler of ours runs."""


@pytest.mark.parametrize("n_calls", range(12))
def test_killed_at_any_call_that_touches_the_disk(
    n_calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Afterwards there is the old checkpoint or the new one, whole."""
    folder, left = tmp_path / "last", [n_calls]
    save(folder, 1)

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in (
            (state_folder, "write_tensors"),
            (state_folder, "_sync"),
            (state_folder.shutil, "rmtree"),
            (state_folder.os, "replace"),
            (Path, "write_text"),
        ):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            save(folder, 2)
        except KilledError:
            is_killed = True
        else:
            is_killed = False
    assert has_state(folder)
    number, weight = loaded(folder)
    assert number == weight
    assert number in ((1, 2) if is_killed else (2,))
    save(folder, 3)
    assert loaded(folder) == (3, 3.0)


@pytest.mark.parametrize("moment", ["hashes", "tensors"])
def test_a_checkpoint_that_is_replaced_while_it_is_read(
    moment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "last"
    save(folder, 1)
    save(folder, 2)
    name = {"hashes": "file_sha256", "tensors": "load_file"}[moment]
    original, numbers = getattr(state_folder, name), iter([3, 4])

    def after_another_process_saved(file: Path) -> object:
        monkeypatch.setattr(state_folder, name, original)
        save(folder, next(numbers))
        return original(file)

    monkeypatch.setattr(state_folder, name, after_another_process_saved)
    part = layer(0.0)
    load_parts({"layer": part}, folder)
    assert float(part.weight.detach()[0, 0]) == 3.0
    monkeypatch.setattr(state_folder, name, after_another_process_saved)
    assert read_state(folder, Numbers) == {"number": 4 if moment == "hashes" else 3}
    assert {path.name for path in tmp_path.iterdir()} == {"last", "last.1"}
    assert capsys.readouterr().err == ""


def test_a_checkpoint_whose_replacement_was_cut_short(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    save(folder, 1)
    folder.rename(tmp_path / "last.1")
    assert has_state(folder)
    assert loaded(folder) == (1, 1.0)
    assert not folder.exists(), "a look moves nothing"
    repair_state(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"last"}
    assert loaded(folder) == (1, 1.0)


def test_repair_where_there_is_nothing(tmp_path: Path) -> None:
    repair_state(tmp_path / "last")
    assert not has_state(tmp_path / "last")
