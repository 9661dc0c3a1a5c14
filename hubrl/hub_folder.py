"""The folder of a hub of one's own: encoders are added to it, weights first and then the card."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hubrl.encoders import check_companions, encoder_of, golden_features
from hubrl.files import file_sha256, locked, save_tensors
from hubrl.specs import HUB_FILE, EncoderSpec, HubSpec, list_hubs, load_hub, save_hub

#: Below a hub's folder: of encoders that are being trained for it.
WORK_FOLDER = ".pretrain"
LOCK_FILE = ".lock"  # no encoder's name begins with a dot


def add_encoder(out: Path, card: EncoderSpec, tensors: Mapping[str, Tensor]) -> Path:
    """
    Write an encoder's weights into a hub's folder, then its card; returns the weight file.

    Commands that finish at the same moment take turns: each adds to what the other has written.

    :param out: folder of the hub, new or old
    :param card: still without weights and golden features
    :param tensors: those that the card's architecture takes, and the layers that it leaves out
    :raises ValueError: if the folder can't be written to, has an encoder of this name or with its
        file, no images suit both this encoder and the others, or the tensors don't fit the
        architecture; nothing is written then
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
        check_file_is_free(out, card.name)
        check_companions(card, hub.encoders if hub else ())
        file = weight_file(out, card.name)
        save_tensors(dict(tensors), file)
        card = dataclasses.replace(card, weights=file.name, sha256=file_sha256(file), golden=golden)
        if hub is None:
            hub = HubSpec(name=out.resolve().name, encoders=(card,))
        else:
            hub = dataclasses.replace(hub, encoders=(*hub.encoders, card))
        save_hub(hub, out)
        return file


def weight_file(out: Path, name: str) -> Path:
    """Where the weights of an encoder of this name are written."""
    return out / f"{name}.safetensors"


def check_file_is_free(out: Path, name: str) -> None:
    """
    :raises ValueError: if a card of another name has the weights that lie there
    """
    if not (out / HUB_FILE).exists():
        return
    file = weight_file(out, name).resolve()
    for card in load_hub(out).encoders:
        if card.name != name and card.weights and (out / card.weights).resolve() == file:
            raise ValueError(
                f"{file.name} in the hub {out} has the weights of encoder {card.name!r}, and "
                "nothing was written; give another --name"
            )


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
