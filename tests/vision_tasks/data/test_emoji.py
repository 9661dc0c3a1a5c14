"""Emoji: their classes by hand, and the rendered set where the font is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import features

from vision_tasks.data import emoji, load_classification
from vision_tasks.data.emoji import FONT_FILE, GROUPS_FILE, load, read_classes

HAS_FONT = FONT_FILE.is_file() and GROUPS_FILE.is_file() and features.check_feature("raqm")
needs_font = pytest.mark.skipif(
    not HAS_FONT, reason="needs Debian's fonts-noto-color-emoji, unicode-data and libfribidi0"
)
LINES = """\
# group: Smileys & Emotion
# subgroup: face-smiling
1F600 ; fully-qualified # x
1F603 ; fully-qualified # x
# subgroup: hand
1F44B ; fully-qualified # x
1F44B 1F3FB ; fully-qualified # x
263A ; unqualified # x
"""


def test_classes_are_the_larger_subgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "emoji-test.txt").write_text(LINES)
    monkeypatch.setattr(emoji, "MIN_IMAGES", 2)
    assert read_classes(tmp_path / "emoji-test.txt") == {
        "face-smiling": ["\U0001f600", "\U0001f603"]
    }


def test_a_missing_font_names_the_packages(tmp_path: Path) -> None:
    message = "apt-get install fonts-noto-color-emoji unicode-data"
    with pytest.raises(
        FileNotFoundError, match=rf"NotoColorEmoji.ttf is missing: .{message}.*--root"
    ):
        load(tmp_path)
    (tmp_path / "NotoColorEmoji.ttf").touch()
    with pytest.raises(FileNotFoundError, match=r"emoji-test.txt is missing"):
        load(tmp_path)


@needs_font
def test_the_rendered_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBRL_CACHE", str(tmp_path))
    data = load_classification("emoji", None, 64, None, 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (799, 282, 292)
    assert data.n_outputs == 39
    images = torch.stack([image for image, _ in (data.test[i] for i in range(0, 292, 20))])
    assert (images[:, :, 0, 0] == 255).float().mean() > 0.5
    # Not one looks like another, though two flags are the same.
    assert images.flatten(1).unique(dim=0).shape[0] == len(images)

    # A second time they come out of the cache, and a damaged cache is named.
    (file,) = (tmp_path / "data").glob("emoji-*.safetensors")
    again = load_classification("emoji", None, 64, 80, 3)
    assert torch.equal(again.test[7][0], data.test[7][0])
    assert torch.equal(again.validation.targets, data.validation.targets)
    file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is damaged .* delete it"):
        load(None)


@needs_font
def test_emoji_of_several_parts_need_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check_feature", lambda name: False)
    with pytest.raises(ValueError, match="apt-get install libfribidi0"):
        load(None)
