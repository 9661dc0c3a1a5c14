"""Recipes: hubs that ship as cards alone, fetched as a whole or not at all, into a cache."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_hubs import nature_spec
from small_runs import small_config
from torch import Tensor

from agents.algorithms import resolve
from hubrl import HubFeaturesExtractor
from hubrl.architectures import NatureConv
from hubrl.encoders import build_encoder
from hubrl.fetching import recipes
from hubrl.fetching.recipes import fetch_hub, load_cards
from hubrl.files import file_sha256
from hubrl.specs import EncoderSpec, HubSpec, list_hubs, load_hub, load_recipe, save_hub


class Source:
    """A provider of random numbers that counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failing: set[str] = set()

    def __call__(self, address: str, spec: EncoderSpec) -> dict[str, Tensor]:
        self.asked.append(address)
        if spec.name in self.failing:
            raise ValueError(f"encoder {spec.name!r}: no network")
        torch.manual_seed(len(address))
        return dict(NatureConv(4).state_dict())


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Source:
    source = Source()
    monkeypatch.setitem(recipes.PROVIDERS, "file", source)
    return source


@pytest.fixture
def built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Source) -> Path:
    """Folder of hubs that ship with hubrl: the recipe ``pair``; and an empty cache."""
    monkeypatch.setattr("hubrl.specs.BUILT_IN_HUBS", tmp_path / "built_in")
    monkeypatch.setenv("HUBRL_CACHE", str(tmp_path / "cache"))
    names = {"a": "file:1", "b": "file:22"}
    specs = [
        dataclasses.replace(nature_spec(name), provider=provider)
        for name, provider in names.items()
    ]
    (tmp_path / "built_in" / "pair").mkdir(parents=True)
    save_recipe(tmp_path / "built_in", *specs)
    return tmp_path / "built_in"


def save_recipe(built_in: Path, *specs: EncoderSpec) -> None:
    save_hub(HubSpec(name="pair", encoders=specs, description="Two."), built_in / "pair")


def left(tmp_path: Path) -> list[str]:
    """What lies in the cache, locks aside."""
    folder = tmp_path / "cache" / "hubs"
    return sorted(file.name for file in folder.iterdir() if not file.name.endswith(".lock"))


def test_a_recipe_is_fetched_once(built_in: Path, source: Source, tmp_path: Path) -> None:
    told: list[str] = []
    hub = fetch_hub("pair", lambda spec: told.append(spec.name))
    assert told == ["a", "b"]
    assert source.asked == ["1", "22"]
    assert hub.folder == tmp_path / "cache" / "hubs" / "pair"
    assert hub.description == "Two."
    assert load_hub("pair") == fetch_hub("pair") == fetch_hub(hub) == hub
    assert load_hub("pair:b") == fetch_hub("pair:b") == hub.only("b")
    assert load_hub(hub.folder).encoders == hub.encoders
    assert len(source.asked) == 2
    torch.manual_seed(2)
    encoder = build_encoder(hub, hub.encoders[1])
    assert torch.equal(encoder.trunk.cnn[0].weight, NatureConv(4).cnn[0].weight)  # type: ignore[union-attr, index]
    assert encoder.spec.golden is not None
    assert left(tmp_path) == ["pair"]


def test_nothing_is_random_before_it_is_fetched(built_in: Path) -> None:
    with pytest.raises(
        ValueError, match=r"hub 'pair' is not on .* `python -m hubrl.hubs fetch pair`"
    ):
        load_hub("pair")
    with pytest.raises(ValueError, match="hub 'pair' is not on this machine"):
        load_hub("pair:b")
    cards = load_cards("pair")
    assert cards == load_hub("pair", weights=False)
    assert load_cards("pair:b").encoder_names == ("b",)
    message = "'a' has no weights yet: get them from file:1 with `python -m hubrl.hubs fetch pair`"
    with pytest.raises(ValueError, match=message):
        build_encoder(cards, cards.encoders[0])
    build_encoder(cards, cards.encoders[0], pretrained=False)
    with pytest.raises(ValueError, match="hub 'pear' is unknown"):
        fetch_hub("pear")


def test_random_encoders_need_no_weights(built_in: Path, source: Source) -> None:
    images = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert HubFeaturesExtractor(images, "pair", random_init=True).pathway.hub == load_cards("pair")
    pair = {"hub.name": "pair"}
    assert resolve(small_config("ppo", {**pair, "hub.random_init": True})).hub.aggregation == "sum"
    with pytest.raises(ValueError, match="hub 'pair' is not on this machine"):
        resolve(small_config("ppo", pair))
    assert source.asked == []


def test_a_recipe_that_was_fetched_with_more_encoders_is_of_another_version(
    built_in: Path, source: Source
) -> None:
    first, _ = load_cards("pair").encoders
    fetch_hub("pair")
    save_recipe(built_in, first)
    with pytest.raises(ValueError, match="hub 'pair' is not on this machine"):
        load_hub("pair")


def test_hubs_with_weights_are_loaded_alone(hub5: Path, source: Source) -> None:
    assert fetch_hub(hub5) == load_cards(hub5) == load_hub(hub5)
    assert source.asked == []


def test_all_or_nothing(built_in: Path, source: Source, tmp_path: Path) -> None:
    source.failing = {"a", "b"}
    with pytest.raises(ValueError, match="encoder 'a': no network; encoder 'b': no network"):
        fetch_hub("pair")
    source.failing = {"b"}
    with pytest.raises(ValueError, match=r"^encoder 'b': no network$"):
        fetch_hub("pair")
    assert left(tmp_path) == []
    source.failing = set()
    fetch_hub("pair")


def test_damaged_files_are_fetched_again(built_in: Path, source: Source) -> None:
    hub = fetch_hub("pair")
    file = hub.weights_path(hub.encoders[0])
    assert file is not None
    file.write_bytes(file.read_bytes()[:-1])
    assert fetch_hub("pair") == hub
    assert file_sha256(file) == hub.encoders[0].sha256
    file.unlink()
    assert fetch_hub("pair") == hub
    assert len(source.asked) == 6


def test_a_recipe_that_changed_is_fetched_again(built_in: Path, source: Source) -> None:
    hub = fetch_hub("pair")
    recipe = load_recipe("pair")
    assert recipe is not None
    a, b = recipe.encoders
    known = dataclasses.replace(a, sha256=hub.encoders[0].sha256, golden=hub.encoders[0].golden)
    save_recipe(built_in, known, b)
    assert load_hub("pair") == hub
    save_recipe(built_in, dataclasses.replace(known, mean=(0.5,)), b)
    with pytest.raises(ValueError, match="or is that of another version of hubrl"):
        load_hub("pair")
    assert fetch_hub("pair").encoders[0].mean == (0.5,)
    save_recipe(built_in, dataclasses.replace(known, sha256="0" * 64), b)
    message = "'a': converted from file:1, it has sha256 .*, its card says 000000000000...: timm, "
    with pytest.raises(ValueError, match=message):
        fetch_hub("pair")


def test_recipes_that_ship_with_hubrl() -> None:
    for name in list_hubs():
        recipe = load_recipe(name)
        for spec in recipe.encoders if recipe else ():
            assert spec.is_licensed
            assert spec.weights is None
            assert str(spec.provider).partition(":")[0] in recipes.PROVIDERS
    assert load_recipe("atari5") is None
    packaged = load_recipe("packaged5")
    assert packaged is not None
    assert all(spec.sha256 and spec.golden for spec in packaged.encoders)


def test_two_that_fetch_at_once_take_turns(
    built_in: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that waited finds what the other has fetched."""
    hub = fetch_hub("pair")
    folder = hub.folder
    assert folder is not None
    shutil.move(folder, folder.with_name("elsewhere"))
    locked = recipes.locked

    def other_is_faster(file: Path) -> object:
        shutil.move(folder.with_name("elsewhere"), folder)
        return locked(file)

    monkeypatch.setattr(recipes, "locked", other_is_faster)
    assert fetch_hub("pair") == hub
    assert len(source.asked) == 2
