"""Hubs of image tasks: fetched on first use, each encoder at the size of the images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from small_hubs import library_spec, nature_spec, write_hub

from hubrl.architectures import NatureConv
from hubrl.encoders import build_encoder, with_features_dim
from hubrl.fetching.recipes import PROVIDERS
from hubrl.specs import HubSpec, save_hub
from vision_tasks.hubs import load_vision_hub


def test_cards_are_enough_without_weights() -> None:
    hub = load_vision_hub("resnet50x5", 64, pretrained=False)
    assert [spec.image_size for spec in hub.encoders] == [(64, 64)] * 5
    assert [spec.features_dim for spec in hub.encoders] == [2048] * 5
    hub = load_vision_hub("packaged5", 96, pretrained=False)
    assert [spec.image_size[0] for spec in hub.encoders] == [96, 96, 96, 98, 96]
    with pytest.raises(ValueError, match="hub 'packaged5': image size is 28 px, allowed: 32 px"):
        load_vision_hub("packaged5", 28, pretrained=False)


def test_a_model_that_knows_no_meta_device(tmp_path: Path) -> None:
    """Its features at another size are counted on the CPU, whatever device is the default."""
    spec = with_features_dim(library_spec("torchvision:regnet_y_400mf", 3, 96))
    save_hub(HubSpec(name="regnet", encoders=(spec,)), tmp_path)
    with torch.device("meta"):
        hub = load_vision_hub(str(tmp_path), 64, pretrained=False)
    assert (hub.encoders[0].image_size, hub.encoders[0].features_dim) == ((64, 64), 440)
    encoder = build_encoder(hub, hub.encoders[0], pretrained=False).eval()
    assert encoder(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 440)


def test_a_games_encoders_take_no_images() -> None:
    message = r"encoder '.*' of atari5 takes 4 channels, but images have three colours: take a hub"
    with pytest.raises(ValueError, match=message):
        load_vision_hub("atari5", 84)


def test_a_hub_is_fetched_on_first_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HUBRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hubrl.specs.BUILT_IN_HUBS", tmp_path)
    monkeypatch.setitem(PROVIDERS, "file", lambda address, spec: NatureConv(3).state_dict())
    (tmp_path / "one").mkdir()
    card = dataclasses.replace(nature_spec("net"), channels=3, provider="file:x")
    save_hub(HubSpec(name="one", encoders=(card,)), tmp_path / "one")
    hub = load_vision_hub("one", 44)
    assert capsys.readouterr().out == "fetching net (MIT) from file:x\n"
    assert load_vision_hub("one", 44) == hub
    assert capsys.readouterr().out == ""
    (spec,) = hub.encoders
    assert spec.image_size == (44, 44)
    path = hub.weights_path(spec)
    assert path is not None
    assert path.is_file()
    assert torch.get_default_device().type == "cpu"


def test_a_linear_layer_has_one_image_size(tmp_path: Path) -> None:
    seen = dataclasses.replace(nature_spec("pong", 64, "nature_cnn"), channels=3)
    hub = write_hub(tmp_path / "own", [seen])
    assert load_vision_hub(str(hub), 64).encoders[0].name == "pong"
    assert load_vision_hub(str(hub), 96, pretrained=False).encoders[0].image_size == (96, 96)
    message = "has a linear layer for images of 64x64 px alone, not of 96x96: give --image-size 64"
    with pytest.raises(ValueError, match=message):
        load_vision_hub(str(hub), 96)
    both = write_hub(
        tmp_path / "two", [seen, dataclasses.replace(seen, name="b", image_size=(96, 96))]
    )
    with pytest.raises(ValueError, match="64x64 px alone, not of 96x96: take others, as HUB"):
        load_vision_hub(str(both), 96)
