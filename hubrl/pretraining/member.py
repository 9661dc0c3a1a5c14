"""A hub folder's member to be: its name, its weights and card, the files of its training beside."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hubrl.encoders import check_companions
from hubrl.files import read_json
from hubrl.hub_folder import WORK_FOLDER, add_encoder, check_file_is_free, check_writable
from hubrl.specs import HUB_FILE, EncoderSpec, load_hub

SETTINGS_FILE = "settings.json"


class Member:
    """
    An encoder that is being trained for a hub.

    :param out: folder of the hub; made when the training begins
    :param card: of the encoder, still without weights
    :param settings: plain data that decide the result of the training
    :raises ValueError: if the folder can't be written to or is not that of a hub, or if the name is
        taken by an encoder that was trained by other settings, or its file by another's weights, or
        if no images suit both the hub's encoders and this one
    """

    def __init__(self, out: Path, card: EncoderSpec, settings: Mapping[str, Any]) -> None:
        self.out, self.card = out, card
        self.work = out / WORK_FOLDER / card.name
        self._settings = json.dumps(dict(settings), indent=1)
        check_writable(out)
        check_file_is_free(out, card.name)
        if (out / HUB_FILE).exists():
            check_companions(card, load_hub(out).encoders)
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
