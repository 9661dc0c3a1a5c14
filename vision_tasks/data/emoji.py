"""Colour emoji, drawn from a font: 39 classes of pictures that no encoder was trained on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import Subset

from vision_tasks.data.images import ArrayImages, ImageData, limited, stratified

#: Where Debian's packages fonts-noto-color-emoji and unicode-data put them.
DEFAULT_ROOT = Path("/usr/share")
FONT_FILE = Path("fonts/truetype/noto/NotoColorEmoji.ttf")
LIST_FILE = Path("unicode/emoji/emoji-test.txt")
FONT_SIZE = 109  # the only one that the font's bitmaps have
MIN_MEMBERS = 15
SHARES = (0.6, 0.2, 0.2)
#: Skin tones and hair styles make variants of one picture.
MODIFIERS = {*range(0x1F3FB, 0x1F400), *range(0x1F9B0, 0x1F9B4)}


def load_emoji(root: Path | None, image_size: int, limit: int | None, seed: int) -> ImageData:
    """
    Single emoji of Unicode's subgroups with at least 15 members, on white.

    Three fifths are for training, a fifth each for validation and test, always the same.

    :param root: folder that has the font and the list where ``/usr/share`` has them
    :raises ValueError: if the font or the list is missing
    """
    root = root or DEFAULT_ROOT
    for file in (FONT_FILE, LIST_FILE):
        if not (root / file).is_file():
            raise ValueError(
                f"emoji: there is no {root / file}: on Debian `apt-get install "
                "fonts-noto-color-emoji unicode-data` puts it where it is looked for; elsewhere "
                "give --root with a folder that has both under these names"
            )
    groups = read_groups(root / LIST_FILE)
    names = tuple(sorted(groups))
    images_NCHW = _draw([text for name in names for text in groups[name]], root / FONT_FILE)
    counts = torch.tensor([len(groups[name]) for name in names])
    targets_N = torch.arange(len(names)).repeat_interleave(counts)
    images = ArrayImages(images_NCHW, targets_N, image_size)
    train, validation, test = (part.tolist() for part in stratified(targets_N, SHARES, seed=0))
    return ImageData(
        limited(Subset(images, train), targets_N[train], limit, seed),
        Subset(images, validation),
        Subset(images, test),
        len(names),
        names,
    )


def read_groups(file: Path) -> dict[str, list[str]]:
    """Emoji of each subgroup that has enough of them; without variants of skin and hair."""
    groups: dict[str, list[str]] = {}
    name = ""
    for line in file.read_text().splitlines():
        if line.startswith("# subgroup:"):
            name = line.partition(":")[2].strip()
        codes, semicolon, rest = line.partition(";")
        if semicolon and not line.startswith("#") and rest.strip().startswith("fully-qualified"):
            points = [int(code, 16) for code in codes.split()]
            if not MODIFIERS & set(points):
                groups.setdefault(name, []).append("".join(map(chr, points)))
    return {name: emoji for name, emoji in groups.items() if len(emoji) >= MIN_MEMBERS}


def _draw(texts: list[str], font_file: Path) -> Tensor:
    font = ImageFont.truetype(os.fspath(font_file), FONT_SIZE)
    images = []
    for text in texts:
        image = Image.new("RGB", (136, 128), "white")
        ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
        images.append(np.asarray(image))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
