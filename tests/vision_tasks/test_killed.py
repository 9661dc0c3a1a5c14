"""An image task that is killed at random moments ends with the bytes of one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_files import write_classes
from killing import last_hashes, survive
from small_images import small_vision_config, write_rgb_hub

from vision_tasks.config import dump_config


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    hub = write_rgb_hub(tmp_path / "rgb")
    for part in ("train", "test"):
        write_classes(tmp_path / "images" / part, {"a": 20, "b": 20, "c": 20})
    config = small_vision_config(
        hub,
        data__name="folder",
        data__root=str(tmp_path / "images"),
        train__epochs=150,
        train__save_freq=1,
    )
    (tmp_path / "c.yaml").write_text(dump_config(config))
    survive(tmp_path, "vision_tasks.classification", "--config", "c.yaml")
    hashes = last_hashes(tmp_path / "cut")
    assert hashes == last_hashes(tmp_path / "whole")
    assert set(hashes) == {"method.safetensors", "optimizer.safetensors"}
