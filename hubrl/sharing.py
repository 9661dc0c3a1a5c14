"""Hubs that are shared: in a folder of others, or in a Hugging Face repository."""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from pathlib import Path

from hubrl.encoders import read_weights
from hubrl.files import is_taken, reason
from hubrl.hub_folder import check_writable
from hubrl.sources import INSTALL_SHARE, download
from hubrl.specs import HUB_FILE, EncoderSpec, HubSpec, closest, list_hubs, load_hub, save_hub


def push(hub: HubSpec, place: str) -> None:
    """
    Copy a hub's cards and weight files to a place, after each sha256 was compared.

    :param place: a new folder, given as a path with a slash at its start or after its dots, or
        ``OWNER/NAME`` of a Hugging Face repository, which is made if it isn't there
    :raises ValueError: if a card states no licence, a weight file is missing or another one, or the
        place can't be written to
    """
    for spec in hub.encoders:
        if not spec.is_licensed:
            raise ValueError(
                f"encoder {spec.name!r}: license is {spec.license!r}, allowed in a hub that is "
                "shared: the SPDX identifier of its weights; state it in the card"
            )
    if not _is_folder(place):
        _check_repository(place)
    with tempfile.TemporaryDirectory() as folder:
        gathered = Path(folder, "hub")
        _gather(hub, gathered)
        if _is_folder(place):
            _move(gathered, Path(place).expanduser())
        else:
            _upload(gathered, place)


def pull(place: str, folder: Path) -> HubSpec:
    """
    Bring a hub from a place into a new folder: its cards, and the weight files that they name.

    :param place: as in ``push``, or the name of a hub that ships with hubrl, which begins one of
        your own
    :raises ValueError: if there is no hub, a card is wrong, a file is another one than its card
        says, or the folder holds something; nothing is left then
    """
    check_writable(folder)
    _check_new(folder)
    with tempfile.TemporaryDirectory() as parent:
        fetched = Path(parent, "hub")
        if place in list_hubs():
            _gather(_begun_with(load_hub(place), folder), fetched)
        else:
            _fetch_hub(place, fetched)
        _move(fetched, folder)
    return load_hub(folder)


def _begun_with(hub: HubSpec, folder: Path) -> HubSpec:
    """A hub of ours as one of the user's, in whose name runs are made and members added."""
    description = f"Begun with {hub.name}: {hub.description}"
    return dataclasses.replace(hub, name=folder.resolve().name, description=description)


def _fetch_hub(place: str, folder: Path) -> None:
    if not _is_folder(place):
        _check_repository(place)
    folder.mkdir()
    _fetch(place, HUB_FILE, folder)
    for spec in load_hub(folder).encoders:
        if spec.weights is not None:  # a file inside: the card was checked
            _check_weights_name(spec)
            _fetch(place, spec.weights, folder)
            read_weights(folder / spec.weights, spec)


def _gather(hub: HubSpec, folder: Path) -> None:
    folder.mkdir()
    for spec in hub.encoders:
        path = hub.weights_path(spec)
        if path is not None and spec.weights is not None:
            _check_weights_name(spec)
            read_weights(path, spec)
            (folder / spec.weights).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / spec.weights)
    save_hub(dataclasses.replace(hub, folder=None), folder)


def _is_folder(place: str) -> bool:
    return place.startswith(("/", "./", "../", "~")) or Path(place).is_dir()


def _check_repository(place: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        raise ValueError(
            f"place {place!r} is unknown{closest(place, list_hubs())}, allowed: OWNER/NAME of a "
            "Hugging Face repository, a folder (/..., ./...), and to pull from a hub that ships "
            f"with hubrl ({', '.join(list_hubs())})"
        )


def _check_weights_name(spec: EncoderSpec) -> None:
    if not str(spec.weights).endswith(".safetensors"):
        raise ValueError(
            f"encoder {spec.name!r}: weights is {spec.weights!r}, allowed in a hub that is shared: "
            "a .safetensors file"
        )


def _check_new(folder: Path) -> None:
    if is_taken(folder):
        raise ValueError(f"{folder} exists and is not empty; give a new folder")


def _move(folder: Path, to: Path) -> None:
    _check_new(to)
    to.absolute().parent.mkdir(parents=True, exist_ok=True)
    if to.exists():
        to.rmdir()  # or the hub would come inside
    shutil.move(folder, to)


def _fetch(place: str, file: str, folder: Path) -> None:
    if not _is_folder(place):
        path = download(place, file)
    else:
        path = Path(place).expanduser() / file
        if not path.is_file():
            raise ValueError(f"{path} is missing: {place} is no hub, or not a whole one")
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / file)


def _upload(folder: Path, repository: str) -> None:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ValueError(f"Hugging Face needs huggingface_hub: {INSTALL_SHARE}") from None
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Hub of encoders")
    except Exception as error:  # no network, no such right, no such name
        raise ValueError(
            f"{repository} can't be written to ({reason(error)}): check the name, the network, and "
            "that you are logged in (hf auth login)"
        ) from None
