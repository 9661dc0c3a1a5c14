"""
Colour emoji, rendered from a font: 39 classes, which are Unicode's subgroups.

A class is a subgroup of ``emoji-test.txt`` with at least 15 fully-qualified emoji, those with a
skin tone left out. Emoji that look the same, such as the flags of Norway and of Bouvet Island, are
one image; else it could be learned from and tested on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, features
from torch import Tensor

from vision_tasks.data.cache import cached, key_of
from vision_tasks.data.images import ImageArray, Part, to_tensor
from vision_tasks.data.sources import ClassSource, read_text

FONT = Path("truetype", "noto", "NotoColorEmoji.ttf")
GROUPS = Path("unicode", "emoji", "emoji-test.txt")
#: Where Debian's packages put them.
FONT_FILE, GROUPS_FILE = Path("/usr/share/fonts") / FONT, Path("/usr/share") / GROUPS
#: The font has bitmaps of this one size, in pixels an em; they are 136x128.
FONT_SIZE, WIDTH, HEIGHT = 109, 136, 128
MIN_IMAGES = 15
SKIN_TONES = range(0x1F3FB, 0x1F400)


def load(root: Path | None) -> ClassSource:
    """
    All images, in memory; they are rendered once.

    :param root: a folder with the font and ``emoji-test.txt``; None: where Debian puts them
    :raises FileNotFoundError: if one is missing
    :raises ValueError: if Pillow can't join the parts of an emoji
    """
    font_file = _find(root / FONT.name if root else FONT_FILE)
    groups_file = _find(root / GROUPS.name if root else GROUPS_FILE)
    if not features.check_feature("raqm"):
        raise ValueError("emoji of several parts need `apt-get install libfribidi0`")
    classes = read_classes(groups_file)
    tensors = cached(
        f"emoji-{_key(font_file, groups_file)}", lambda: _render_all(classes, font_file)
    )
    return ClassSource(tuple(classes), Part(ImageArray(tensors["images"]), tensors["labels"]), None)


def read_classes(groups_file: Path) -> dict[str, list[str]]:
    """The emoji of each class, in Unicode's order."""
    subgroups: dict[str, list[str]] = {}
    emoji: list[str] = []
    for line in read_text(groups_file).splitlines():
        if line.startswith("# subgroup:"):
            emoji = subgroups.setdefault(line.partition(":")[2].strip(), [])
        points, _, rest = line.partition(";")
        if rest.split("#")[0].strip() == "fully-qualified":
            numbers = [int(point, 16) for point in points.split()]
            if not any(number in SKIN_TONES for number in numbers):
                emoji.append("".join(map(chr, numbers)))
    return {name: emoji for name, emoji in subgroups.items() if len(emoji) >= MIN_IMAGES}


def render(emoji: str, font: ImageFont.FreeTypeFont) -> Tensor:
    """Uint8 (3, 128, 136), on white."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    ImageDraw.Draw(image).text((0, 0), emoji, font=font, embedded_color=True)
    return to_tensor(image)


def _render_all(classes: dict[str, list[str]], font_file: Path) -> dict[str, Tensor]:
    font = ImageFont.truetype(font_file, FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    images: dict[bytes, tuple[Tensor, int]] = {}
    for label, emoji in enumerate(classes.values()):
        for one in emoji:
            image_3HW = render(one, font)
            images.setdefault(np.asarray(image_3HW).tobytes(), (image_3HW, label))
    labels = torch.tensor([label for _, label in images.values()])
    return {"images": torch.stack([image for image, _ in images.values()]), "labels": labels}


def _key(*files: Path) -> str:
    """It changes with what is rendered."""
    # Which emoji look the same, and are one image, is up to them.
    renderers = [features.version(name) for name in ("pil", "freetype2", "raqm", "harfbuzz")]
    return key_of((*files, Path(__file__)), str(renderers))


def _find(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: `apt-get install fonts-noto-color-emoji unicode-data`, or give "
            f"--root, a folder with {FONT.name} and {GROUPS.name}"
        )
    return file
