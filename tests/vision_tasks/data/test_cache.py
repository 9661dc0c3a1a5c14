"""Rendered images are kept once, for all users of the folder, as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from hubrl import files
from vision_tasks.data.cache import cached


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HUBRL_CACHE", str(tmp_path))
    return tmp_path / "data"


def make() -> dict[str, Tensor]:
    return {"images": torch.arange(6, dtype=torch.uint8)}


def test_what_was_made_is_kept_for_all(folder: Path) -> None:
    assert torch.equal(cached("faces", make)["images"], make()["images"])
    assert torch.equal(cached("faces", dict)["images"], make()["images"])
    (folder / "new").touch()
    assert (folder / "faces.safetensors").stat().st_mode == (folder / "new").stat().st_mode


def test_a_full_disk_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match=r"faces.safetensors.* can't be written: No space left"):
        cached("faces", make)
    assert not (folder / "faces.safetensors").exists()
