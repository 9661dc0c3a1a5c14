"""A hub folder's member to be: its name, its weights and card, the files of its training beside."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hubrl.encoders import encoder_of, golden_features
from hubrl.files import file_sha256, locked, read_json, save_tensors
from hubrl.specs import HUB_FILE, EncoderSpec, HubSpec, list_hubs, load_hub, save_hub

WORK_FOLDER = ".pretrain"
SETTINGS_FILE = "settings.json"
LOCK_FILE = ".lock"  # no encoder's name begins with a dot


class Member:
    """
    An encoder that is being trained for a hub.

    :param out: folder of the hub; made when the training begins
    :param card: of the encoder, still without weights
    :param settings: plain data that decide the result of the training
    :raises ValueError: if the folder can't be written to or is not that of a hub, or if the name is
        taken by an encoder that was trained by other settings
    """

    def __init__(self, out: Path, card: EncoderSpec, settings: Mapping[str, Any]) -> None:
        self.out, self.card = out, card
        self.work = out / WORK_FOLDER / card.name
        self._settings = json.dumps(dict(settings), indent=1)
        check_writable(out)
        self._check_settings()
        if self.is_complete() and not self.work.is_dir():
            raise ValueError(f"name {card.name!r} is taken in the hub {out}; give another --name")

    def is_complete(self) -> bool:
        """Whether the hub has this encoder."""
        has_hub = (self.out / HUB_FILE).exists()
        return has_hub and self.card.name in load_hub(self.out).encoder_names

    def open(self) -> None:
        """Make the folders."""
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / SETTINGS_FILE).write_text(self._settings)

    def add(self, tensors: dict[str, Tensor], pretraining: Mapping[str, Any]) -> Path:
        """
        Add the trained encoder to the hub; returns the weight file.

        :param tensors: of the encoder, named as in SB3's NatureCNN
        :param pretraining: facts for the card
        :raises ValueError: if another command has added an encoder of this name in the meantime
        """
        card = dataclasses.replace(self.card, pretraining=dict(pretraining))
        return add_encoder(self.out, card, tensors)

    def _check_settings(self) -> None:
        file = self.work / SETTINGS_FILE
        if not file.exists():
            return
        before = read_json(file)
        for key, value in json.loads(self._settings).items():
            if before.get(key) != value:
                raise ValueError(
                    f"{key} is {value!r}, but the encoder {self.card.name!r} in {self.out} was "
                    f"begun with {before.get(key)!r}; give another --name, or remove {self.work}"
                )


def add_encoder(out: Path, card: EncoderSpec, tensors: Mapping[str, Tensor]) -> Path:
    """
    Write an encoder's weights into a hub's folder, then its card; returns the weight file.

    Commands that finish at the same moment take turns: each adds to what the other has written.

    :param out: folder of the hub, new or old
    :param card: still without weights and golden features
    :param tensors: those that the card's architecture takes, and the layers that it leaves out
    :raises ValueError: if the folder can't be written to, has an encoder of this name, or the
        tensors don't fit the architecture; nothing is written then
    """
    check_writable(out)
    golden = golden_features(encoder_of(card, {key: t.float() for key, t in tensors.items()}))
    folder = out / WORK_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK_FILE):
        hub = load_hub(out) if (out / HUB_FILE).exists() else None
        if hub and card.name in hub.encoder_names:
            raise ValueError(
                f"name {card.name!r} was taken in the hub {out} before, and nothing was written; "
                "give another --name"
            )
        file = out / f"{card.name}.safetensors"
        save_tensors(dict(tensors), file)
        card = dataclasses.replace(card, weights=file.name, sha256=file_sha256(file), golden=golden)
        if hub is None:
            hub = HubSpec(name=out.resolve().name, encoders=(card,))
        else:
            hub = dataclasses.replace(hub, encoders=(*hub.encoders, card))
        save_hub(hub, out)
        return file


def check_writable(out: Path) -> None:
    """
    :raises ValueError: if ``out`` can't be the folder of a hub that one adds to
    """
    if str(out) in list_hubs():
        raise ValueError(
            f"out {out} is the name of a hub that ships with hubrl, allowed: another folder; "
            f"hubrl hubs pull {out} my_hub begins one of your own with it"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"out {out} is a file, allowed: a folder, new or of a hub")
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"out {out} can't be written to; give another folder")
