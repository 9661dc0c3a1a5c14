"""Replay buffers on disk: whatever was added, they come back as they were."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.buffers import ReplayBuffer

from agents import replay_files
from agents.replay_files import ARRAYS, ReplayFiles

IMAGES = spaces.Box(0, 255, (2, 6, 6), np.uint8)


def a_buffer(n_rows: int, n_envs: int = 2, actions: spaces.Space | None = None) -> ReplayBuffer:
    actions = actions or spaces.Box(-1.0, 1.0, (3,), np.float32)
    return ReplayBuffer(n_rows * n_envs, IMAGES, actions, "cpu", n_envs)


def add(buffer: ReplayBuffer, n_rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(n_rows):
        images = rng.integers(0, 256, (2, buffer.n_envs, *IMAGES.shape), np.uint8)
        actions = rng.uniform(-1, 1, (buffer.n_envs, 3))
        rewards, dones = rng.normal(size=buffer.n_envs), rng.random(buffer.n_envs) < 0.5
        infos = [{"TimeLimit.truncated": bool(done)} for done in dones]
        buffer.add(*images, actions, rewards, dones, infos)


def assert_equal(found: ReplayBuffer, expected: ReplayBuffer) -> None:
    assert (found.pos, found.full) == (expected.pos, expected.full)
    for name in ARRAYS:
        n_rows = expected.size()
        np.testing.assert_array_equal(
            getattr(found, name)[:n_rows], getattr(expected, name)[:n_rows]
        )


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_files, "BLOCK", 4)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 11),
    steps=st.lists(st.tuples(st.integers(0, 13), st.booleans()), min_size=1, max_size=6),
)
def test_it_comes_back(
    size: int, steps: list[tuple[int, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Steps: rows that are added, and whether a checkpoint is made then."""
    folder = tmp_path_factory.mktemp("replay")
    buffer, total = a_buffer(size), 0
    files = ReplayFiles(buffer, folder / "files")
    for number, (n_rows, is_saved) in enumerate(steps):
        add(buffer, n_rows, seed=number)
        total += n_rows
        files.update(total, partly=False)
        if is_saved:
            checkpoint = folder / f"checkpoint{number}"
            checkpoint.mkdir()
            for file in files.update(total, partly=True):
                shutil.copy(file, checkpoint)
            found = a_buffer(size)
            again = ReplayFiles(found, folder / f"again{number}")
            again.restore(checkpoint, total)
            assert_equal(found, buffer)
            buffer, files = found, again  # the run goes on from there


def test_full_blocks_are_written_once(tmp_path: Path) -> None:
    buffer = a_buffer(12)
    files = ReplayFiles(buffer, tmp_path)
    add(buffer, 9, seed=0)
    assert files.update(9, partly=False) == [
        tmp_path / "replay-000000-000000000004.safetensors",
        tmp_path / "replay-000001-000000000008.safetensors",
    ]
    times = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(files.update(9, partly=True)) == 3
    assert {file: file.stat().st_mtime_ns for file in times} == times
    add(buffer, 6, seed=1)
    names = sorted(file.name[7:26] for file in files.update(15, partly=True))
    assert names == ["000000-000000000015", "000001-000000000008", "000002-000000000012"]
    assert len(list(tmp_path.iterdir())) == 3, "what is overwritten in memory goes"


def test_files_of_another_buffer(tmp_path: Path) -> None:
    buffer = a_buffer(8)
    add(buffer, 8, seed=0)
    ReplayFiles(buffer, tmp_path / "files").update(8, partly=True)
    other = a_buffer(8, n_envs=1)
    message = r"replay-000000-000000000004.safetensors can't be loaded: its arrays have another"
    with pytest.raises(ValueError, match=message):
        ReplayFiles(other, tmp_path / "other").restore(tmp_path / "files", 8)


def test_a_missing_block(tmp_path: Path) -> None:
    buffer = a_buffer(8)
    add(buffer, 8, seed=0)
    first, _ = ReplayFiles(buffer, tmp_path / "files").update(8, partly=True)
    first.unlink()
    with pytest.raises(ValueError, match=r"checkpoint \S+files lacks replay block 0"):
        ReplayFiles(buffer, tmp_path / "other").restore(tmp_path / "files", 8)
