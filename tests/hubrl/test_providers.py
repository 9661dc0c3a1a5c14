"""Encoders from elsewhere: what is taken, what is refused, and that no stranger's code runs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from sb3_agents import make_agent
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.torch_layers import NatureCNN

import hubrl
from hubrl.encoders import build_encoder
from hubrl.hubs import check_encoder, command
from hubrl.pretraining.member import add_encoder
from hubrl.providers import Wishes, from_file, from_sb3
from hubrl.specs import load_hub

MIT = Wishes(license="MIT")


def saved_agent(algorithm: Any, file: Path, size: int = 36, **policy_kwargs: Any) -> Any:
    discrete = algorithm is not SAC
    env = FakeImageEnv(
        screen_height=size, screen_width=size, n_channels=4, channel_first=True, discrete=discrete
    )
    replay = {} if algorithm is PPO else {"buffer_size": 10}
    model = algorithm("CnnPolicy", env, policy_kwargs=policy_kwargs, **replay)
    model.save(file)
    return model


def nature_of(model: Any) -> NatureCNN:
    policy = model.policy
    for owner in (policy, getattr(policy, "q_net", None), getattr(policy, "actor", None)):
        if isinstance(getattr(owner, "features_extractor", None), NatureCNN):
            return owner.features_extractor
    raise AssertionError("no NatureCNN")


@pytest.mark.parametrize("algorithm", [PPO, DQN, SAC])
def test_an_agents_encoder_gives_its_features(algorithm: Any, tmp_path: Path) -> None:
    model = saved_agent(algorithm, tmp_path / "Agent of Pong.zip")
    card, tensors = from_sb3(tmp_path / "Agent of Pong.zip", MIT)
    assert (card.name, card.architecture, card.features_dim) == ("agent_of_pong", "nature_cnn", 512)
    assert (card.image_size, card.channels) == ((36, 36), 4)
    add_encoder(tmp_path / "hub", card, tensors)
    hub = load_hub(tmp_path / "hub")
    encoder = build_encoder(hub, hub.encoders[0])
    images = torch.randint(0, 256, (3, 4, 36, 36), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), nature_of(model)(images / 255.0))
    failed = [check.name for check in check_encoder(encoder) if not check.holds]
    assert failed == []


def test_convolutions_alone_and_other_widths(tmp_path: Path) -> None:
    file = tmp_path / "agent.zip"
    saved_agent(PPO, file, features_extractor_kwargs={"features_dim": 64})
    assert from_sb3(file, MIT).card.architecture == "nature_conv"
    saved_agent(PPO, file)
    card, _ = from_sb3(file, MIT._replace(architecture="nature_conv", name="Conv"))
    assert (card.name, card.features_dim) == ("conv", 64)


@pytest.mark.parametrize("size", [36, 40, 84, 100])
def test_the_image_size_follows_from_the_weights(size: int, tmp_path: Path) -> None:
    """The smallest that gives as many features."""
    saved_agent(PPO, tmp_path / "agent.zip", size)
    found = from_sb3(tmp_path / "agent.zip", MIT).card.image_size[0]
    assert found <= size < found + 8


def test_architectures_that_are_not_known(tmp_path: Path, hub5: Path) -> None:
    env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=4, channel_first=True)
    PPO("MlpPolicy", env).save(tmp_path / "mlp.zip")
    with pytest.raises(ValueError, match=r"its features extractor is no NatureCNN of SB3.*none"):
        from_sb3(tmp_path / "mlp.zip", MIT)
    make_agent("ppo", hub5).save(tmp_path / "hub.zip")
    with pytest.raises(ValueError, match=r"no NatureCNN of SB3.*features_extractor\.pathway"):
        from_sb3(tmp_path / "hub.zip", MIT)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self._file}",))


def zip_of(file: Path, **entries: bytes) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name.replace("_pth", ".pth"), content)
    return file


def test_a_strangers_zip_runs_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    payload = io.BytesIO()
    torch.save({"features_extractor.cnn.0.weight": Bomb(trace)}, payload)
    data = json.dumps({"policy_kwargs": {":serialized:": pickle.dumps(Bomb(trace)).hex()}}).encode()
    for content in (payload.getvalue(), pickle.dumps(Bomb(trace)), b"", b"\x80\x04]."):
        file = zip_of(tmp_path / "evil.zip", policy_pth=content, data=data)
        with pytest.raises(ValueError, match=r"evil\.zip: policy\.pth "):
            from_sb3(file, MIT)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04" + bytes(40)])
def test_files_that_are_no_agent(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ValueError, match="is no agent saved by Stable-Baselines3"):
        from_sb3(tmp_path / "x.zip", MIT)
    with pytest.raises(ValueError, match="is no agent saved by Stable-Baselines3"):
        from_sb3(zip_of(tmp_path / "empty.zip"), MIT)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubrl.providers.MAX_UNPACKED", 1000)
    file = zip_of(tmp_path / "bomb.zip", policy_pth=bytes(1001))
    with pytest.raises(ValueError, match=r"would unpack to 1,001 bytes, too many"):
        from_sb3(file, MIT)


@pytest.fixture
def timm_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    file = tmp_path / "timm_net.safetensors"
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), file)
    return file


@pytest.fixture
def torchvision_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    file = tmp_path / "tv_net.safetensors"
    save_file(torchvision.models.get_model("shufflenet_v2_x0_5").state_dict(), file)
    return file


def test_models_of_libraries_give_their_features(timm_file: Path, torchvision_file: Path) -> None:
    """Without the classifier, on pixels normalised as ImageNet's."""
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    pixels = (images / 255.0 - mean) / std
    theirs = timm.create_model("test_resnet", pretrained=False, num_classes=0).eval()
    theirs.load_state_dict(load_file(timm_file), strict=False)
    other = torchvision.models.get_model("shufflenet_v2_x0_5").eval()
    other.load_state_dict(load_file(torchvision_file))
    other.fc = torch.nn.Identity()
    for file, architecture, model in (
        (timm_file, "timm:test_resnet", theirs),
        (torchvision_file, "torchvision:shufflenet_v2_x0_5", other),
    ):
        card, tensors = from_file(file, Wishes("x", "MIT", architecture, 64))
        folder = file.parent / file.stem
        add_encoder(folder, card, tensors)
        hub = load_hub(folder)
        encoder = build_encoder(hub, hub.encoders[0])
        with torch.no_grad():
            torch.testing.assert_close(encoder(images), model(pixels), atol=1e-4, rtol=1e-4)


def test_atari_timm_and_torchvision_drive_one_agent(
    tmp_path: Path, timm_file: Path, torchvision_file: Path
) -> None:
    """Three architectures, sizes and normalisations behind a stack of four grey frames."""
    hub = tmp_path / "hub"
    saved_agent(PPO, tmp_path / "pong.zip")
    for card, tensors in (
        from_sb3(tmp_path / "pong.zip", MIT),
        from_file(timm_file, Wishes(None, "MIT", "timm:test_resnet", 48)),
        from_file(torchvision_file, Wishes(None, "MIT", "torchvision:shufflenet_v2_x0_5", 64)),
    ):
        add_encoder(hub, card, tensors)
    spec = load_hub(hub)
    assert [s.name for s in spec.encoders] == ["pong", "timm_net", "tv_net"]
    assert len({s.features_dim for s in spec.encoders}) > 1
    model = make_agent("ppo", hub, freeze=["tv_net"], top_k=3)
    model.learn(32)
    changes = {
        c.name: c.is_same
        for c in hubrl.pathway.encoder_changes(model.policy.features_extractor.pathway)
    }
    assert changes == {"pong": False, "timm_net": False, "tv_net": True}


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (Wishes(license="MIT"), "doesn't say what it is: give --architecture"),
        (
            Wishes(architecture="nature_cn"),
            r"architecture 'nature_cn' is unknown \(closest: 'nature_cnn",
        ),
        (Wishes(architecture="timm:test_resnett"), r"timm has no model .* \(closest: 'test_resnet"),
        (
            Wishes(architecture="torchvision:resnet19"),
            r"torchvision has no classification model .*closest: 'res",
        ),
        (Wishes(architecture="keras:resnet18"), "architecture 'keras:resnet18' is unknown"),
    ],
)
def test_architectures_are_named(wishes: Wishes, message: str, timm_file: Path) -> None:
    with pytest.raises(ValueError, match=message):
        from_file(timm_file, wishes)


def test_torchvision_models_take_colours(torchvision_file: Path, tmp_path: Path) -> None:
    wishes = Wishes("x", "MIT", "torchvision:shufflenet_v2_x0_5", 64)
    card, tensors = from_file(torchvision_file, wishes)
    grey = dataclasses.replace(card, channels=1, mean=(0.0,), std=(1.0,))
    with pytest.raises(ValueError, match="channels is 1, but torchvision's models take 3"):
        add_encoder(tmp_path / "hub", grey, tensors)


def test_tensors_that_do_not_fit_leave_nothing(timm_file: Path, tmp_path: Path) -> None:
    card, tensors = from_file(timm_file, Wishes("x", "MIT", "timm:test_resnet", 48))
    del tensors["conv1.0.weight"]
    with pytest.raises(ValueError, match="does not fit architecture 'timm:test_resnet'"):
        add_encoder(tmp_path / "hub", card, tensors)
    assert not list((tmp_path / "hub").glob("[!.]*"))


def run(*arguments: str) -> int:
    result = command.main(list(arguments), standalone_mode=False)
    return int(result or 0)


def test_the_command_adds_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_agent(PPO, tmp_path / "ppo_pong.zip")
    source = ("--from-sb3", str(tmp_path / "ppo_pong.zip"))
    hub = str(tmp_path / "my_hub")
    with pytest.raises(Exception, match="encoder 'ppo_pong' has no licence: give --license"):
        run("add", hub, *source)
    assert not (tmp_path / "my_hub").exists()
    run("add", hub, *source, "--license", "MIT")
    assert "encoder ppo_pong, nature_cnn, 4 channels of 36x36 px" in capsys.readouterr().out
    with pytest.raises(Exception, match="name 'ppo_pong' was taken in the hub"):
        run("add", hub, *source, "--license", "MIT")
    with pytest.raises(Exception, match="no source given, allowed: one of --from-sb3, --from-file"):
        run("add", hub)
    with pytest.raises(Exception, match="--from-sb3 and --from-timm given, allowed: one of"):
        run("add", hub, *source, "--from-timm", "resnet18")
    with pytest.raises(Exception, match="--from-hf only: give OWNER/NAME"):
        run("add", hub, "--from-hf", "only", "--license", "MIT")
