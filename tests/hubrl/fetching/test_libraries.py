"""Weights of torchvision and timm, and files of the user: from caches, or a line of why not."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
from fake_files import random_trunk
from safetensors.torch import save_file
from small_hubs import nature_spec

from hubrl.fetching import libraries
from hubrl.fetching.recipes import fetch_hub, load_cards
from hubrl.files import file_sha256
from hubrl.specs import EncoderSpec, load_hub, load_recipe, single_name

DEEPLAB = "DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1"
MODEL = "test_resnet"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of ours and of torch, and no network."""

    def no_network(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("HUBRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    (tmp_path / "cache" / "files").mkdir(parents=True)
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "cache"


def resnet50_card() -> EncoderSpec:
    recipe = load_recipe("resnet50x5")
    assert recipe is not None
    return recipe.encoders[0]


def test_torchvision_weights_come_from_its_cache(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = resnet50_card()
    state = random_trunk(card).state_dict()
    file = tmp_path / "torch/hub/checkpoints/deeplabv3_resnet50_coco-cd0a2569.pth"
    message = (
        rf"'imagenet': torchvision's {DEEPLAB} can't be had \(.*no network.*\); put "
        rf"https://.*/{file.name} into {file.parent}"
    )
    with pytest.raises(ValueError, match=message):
        libraries.from_torchvision(DEEPLAB, card)
    torch.save({f"backbone.{key}": tensor for key, tensor in state.items()}, file)
    with pytest.raises(ValueError, match=rf"can't be had \({file} is damaged; remove it\)"):
        libraries.from_torchvision(DEEPLAB, card)
    monkeypatch.setattr("hubrl.fetching.libraries.file_sha256", lambda file: "cd0a2569" + "0" * 56)
    found = libraries.from_torchvision(DEEPLAB, card)
    assert torch.equal(found["layer4.2.conv3.weight"], state["layer4.2.conv3.weight"])
    with pytest.raises(
        ValueError, match=r"is 'torchvision:ResNet18', allowed: .* ResNet50_Weights"
    ):
        libraries.from_torchvision("ResNet18", card)


def test_torchvision_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    message = rf"'imagenet': torchvision's {DEEPLAB} needs torchvision: pip install \"hubrl\[vision"
    with pytest.raises(ValueError, match=message):
        libraries.from_torchvision(DEEPLAB, resnet50_card())


def test_files_of_the_user(cache: Path) -> None:
    card = dataclasses.replace(nature_spec("moco"), source="https://example.org")
    name = "moco_v2_800ep_pretrain.pth.tar"
    message = rf"'moco': {cache}/files/{name} is missing; put it there; source: https://example.org"
    with pytest.raises(ValueError, match=message):
        libraries.from_user_file(name, card)
    with pytest.raises(ValueError, match=rf"provider is 'file:x.pth', allowed: file: .* {name}"):
        libraries.from_user_file("x.pth", card)


def test_models_of_timm_are_a_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = (MODEL, "test_vit")
    hub = f"timm:{','.join(models)}"
    cards = load_cards(hub)
    assert cards.encoder_names == models
    assert all(spec.license == "Apache-2.0" and not spec.is_fetched for spec in cards.encoders)
    for model in models:
        net = timm.create_model(model, pretrained=False)
        save_file(net.state_dict(), cache / "files" / f"{model}.safetensors")
    found = fetch_hub(hub)
    assert load_hub(hub) == found
    assert found.encoder_names == models
    assert load_hub("timm:test_vit").encoders == found.encoders[1:]
    singles = [single_name(hub, spec.name) for spec in found.encoders]
    assert [load_hub(name).encoders for name in singles] == [(spec,) for spec in found.encoders]
    assert single_name("timm:test_vit", found.encoders[1].name) == "timm:test_vit"
    assert load_cards(hub) == found
    for spec in found.encoders:
        assert file_sha256(found.weights_path(spec)) == spec.sha256  # type: ignore[arg-type]
        assert spec.golden is not None
    monkeypatch.setattr("hubrl.fetching.libraries.from_timm", None)
    assert fetch_hub(hub) == found


def test_models_of_timm_that_cannot_be_had(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = f"timm:{MODEL}"
    with pytest.raises(ValueError, match=f"hub '{hub}' is not on this machine.*hubs fetch {hub}`"):
        load_hub(hub)
    with pytest.raises(
        ValueError, match=r"timm has no pretrained model 'resnet19' \(closest: 'resne"
    ):
        fetch_hub("timm:resnet19")
    for wrong in ("timm:", "timm:a,,b", "timm:../x", "timm:a, b"):
        with pytest.raises(ValueError, match="must be timm:NAME or timm:NAME,NAME, without spaces"):
            load_hub(wrong)

    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("timm.create_model", no_network)
    message = (
        rf"timm's {MODEL} can't be had \(no network\); put https://huggingface.co/timm/.*/model"
        rf".safetensors there as {cache}/files/{MODEL}.safetensors"
    )
    with pytest.raises(ValueError, match=message):
        libraries.from_timm(MODEL, nature_spec(MODEL))
    config = timm.get_pretrained_cfg(MODEL)
    unlicensed = types.SimpleNamespace(**{**vars(config), "license": "unknown"})
    monkeypatch.setattr("timm.get_pretrained_cfg", lambda model: unlicensed)
    with pytest.raises(ValueError, match=r"timm states no licence for 'test_resnet': .*--license"):
        load_cards(hub)
