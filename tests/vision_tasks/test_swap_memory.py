"""What training with swapped encoders needs; whole processes, so all but the parts are slow."""

from __future__ import annotations

import gc
import json
import mmap
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from vision_tasks.process_memory import MB, read_memory
from vision_tasks.swap_memory import (
    GOAL,
    Side,
    Sizes,
    command,
    measure,
    random_hub,
    save_random_weights,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells alone")


def test_memory_is_read_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux says kB, and means 1,024 bytes."""
    status = "Name:\tpython\nVmRSS:\t    1000 kB\nThreads:\t1\n"
    monkeypatch.setattr(Path, "read_text", lambda _: status)
    assert read_memory() == {"VmRSS": 1_024_000}


def test_memory_is_that_of_the_process() -> None:
    gc.collect()  # or garbage of other tests goes in the meantime
    before = read_memory(os.getpid())
    # Fresh pages: a tensor could lie in memory that other tests have freed.
    held = mmap.mmap(-1, 100_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for _ in range(100):  # one large object of bytes could leave pages behind
        held.write(bytes([1]) * 1_000_000)
    after = read_memory()
    assert (after["RssAnon"] - before["RssAnon"]) / MB == pytest.approx(100, abs=10)
    assert after["VmHWM"] >= after["VmRSS"] >= after["RssAnon"]
    held.close()


def test_encoders_of_a_random_hub_share_a_file(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    hub = random_hub(3, 64, tmp_path / "weights.safetensors")
    assert hub.encoder_names == ("r0", "r1", "r2")
    assert {hub.weights_path(spec) for spec in hub.encoders} == {tmp_path / "weights.safetensors"}


def test_a_process_that_dies(tmp_path: Path) -> None:
    side, sizes = Side(2, None), Sizes(32, 2, 2)
    with pytest.raises(ValueError, match=r"the process of .* ended with code 1: if that is"):
        measure(side, sizes, tmp_path / "missing.safetensors")


def test_results_need_a_folder(tmp_path: Path) -> None:
    result = CliRunner().invoke(command, ["--json", str(tmp_path / "missing" / "memory.json")])
    assert result.exit_code == 2
    assert "there is no folder" in result.output
    result = CliRunner().invoke(command, ["--json", str(tmp_path)])
    assert result.exit_code == 2
    assert "is a folder: give a file" in result.output


@pytest.mark.slow
def test_a_hub_of_20_needs_hardly_more_memory_than_one_of_2(tmp_path: Path) -> None:
    weights, sizes = save_random_weights(tmp_path), Sizes(image_size=64, batch_size=12, n_steps=3)
    small, large = (measure(side, sizes, weights) for side in (Side(2, None), Side(20, 2)))
    assert large.peak <= GOAL * small.peak
    assert large.anonymous <= GOAL * small.anonymous
    assert large.peak - large.imported <= GOAL * (small.peak - small.imported)


@pytest.mark.slow
def test_the_command_measures_all_sides(tmp_path: Path) -> None:
    small = ["--n-encoders", "3", "--swap", "1", "--image-size", "32", "--batch-size", "2"]
    file = tmp_path / "memory.json"
    arguments = [*small, "--steps", "2", "--rounds", "1", "--json", str(file)]
    result = CliRunner().invoke(command, [*arguments, "--folder", str(tmp_path)])
    assert result.exit_code == 0, result.output
    sides = json.loads(file.read_text())["sides"]
    assert [(side["n_encoders"], side["swap"]) for side in sides] == [
        (2, None),
        (2, 1),
        (3, 1),
        (3, None),
    ]
    assert sides[2]["peak"] < sides[3]["peak"]
    assert [path for path in tmp_path.iterdir() if path != file] == []
