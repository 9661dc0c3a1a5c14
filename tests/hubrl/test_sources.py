"""Encoders from elsewhere: what is taken, what is refused, and that no stranger's code runs."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from gymnasium import Env, spaces
from hugging_face import Service
from safetensors.torch import load_file, save, save_file
from sb3_agents import make_agent
from small_hubs import call_hubs, nature_spec, write_hub
from small_runs import small_config, small_env
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.torch_layers import NatureCNN
from torch import Tensor

from agents.algorithms import build_model, resolve
from agents.checkpoints import save_checkpoint
from agents.runs import checkpoint_dir, create_run
from envs import ImageFormat
from hubrl.encoders import build_encoder, check_image_shape
from hubrl.games import image_format
from hubrl.hub_folder import add_encoder
from hubrl.hubs import check_encoder
from hubrl.saved_agents import agent_data, policy_tensors
from hubrl.sources import (
    Wishes,
    _hub_tensors,
    from_file,
    from_hf,
    from_run,
    from_sb3,
    from_timm,
    from_torchvision,
)
from hubrl.specs import load_hub, save_hub

MIT = Wishes(license="MIT")


def saved_agent(
    algorithm: Any, file: Path, size: tuple[int, int] = (36, 36), **policy_kwargs: Any
) -> Any:
    discrete = algorithm is not SAC
    height, width = size
    env = FakeImageEnv(
        screen_height=height,
        screen_width=width,
        n_channels=4,
        channel_first=True,
        discrete=discrete,
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


@pytest.mark.parametrize(
    ("algorithm", "size", "policy_kwargs"),
    [
        (PPO, (36, 44), {"share_features_extractor": False}),
        (PPO, (36, 36), {"features_extractor_kwargs": {"features_dim": 64}}),
        (DQN, (52, 40), {}),
        (SAC, (36, 36), {}),
    ],
)
def test_an_agents_encoder_gives_its_features(
    algorithm: Any, size: tuple[int, int], policy_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    model = saved_agent(algorithm, tmp_path / "Agent of Pong.zip", size, **policy_kwargs)
    card, tensors = from_sb3(tmp_path / "Agent of Pong.zip", MIT)
    assert (card.name, card.architecture) == ("agent_of_pong", "nature_cnn")
    assert card.features_dim == nature_of(model).features_dim
    assert (card.image_size, card.channels, card.frames) == (size, 4, "stack")
    assert card.pretraining == {"steps": 0}
    add_encoder(tmp_path / "hub", card, tensors)
    hub = load_hub(tmp_path / "hub")
    encoder = build_encoder(hub, hub.encoders[0])
    images = torch.randint(0, 256, (3, 4, *size), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images), nature_of(model)(images / 255.0))
    failed = [check.name for check in check_encoder(encoder) if not check.holds]
    assert failed == []


def test_the_convolutions_alone(tmp_path: Path) -> None:
    file = tmp_path / "agent.zip"
    saved_agent(PPO, file)
    card, tensors = from_sb3(file, MIT._replace(architecture="nature_conv", name="Conv"))
    assert (card.name, card.features_dim) == ("conv", 64)
    add_encoder(tmp_path / "hub", card, tensors)
    with pytest.raises(ValueError, match="architecture is 'timm:x', allowed of an agent of SB3: n"):
        from_sb3(file, MIT._replace(architecture="timm:x"))


def test_agents_that_see_a_stack_of_grey_or_one_frame_of_colours(tmp_path: Path) -> None:
    cards = {}
    for n in (1, 3, 4):
        env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=n, channel_first=True)
        PPO("CnnPolicy", env, seed=0).save(tmp_path / f"see{n}.zip")
        cards[n], tensors = from_sb3(tmp_path / f"see{n}.zip", MIT)
        add_encoder(tmp_path / "hub", cards[n], tensors)
    assert [card.frames for card in cards.values()] == ["last", "last", "stack"]
    shape = (4, 36, 36)  # in which all see something
    for card in cards.values():
        check_image_shape(card, shape)


@pytest.mark.parametrize(
    ("stack", "one"),
    [
        ({"channels": 6}, {"channels": 3, "frames": "last"}),
        ({"channels": 1, "frames": "each", "n_frames": 3, "features_dim": 192}, {"channels": 1}),
    ],
)
def test_three_grey_frames_that_would_be_colours(
    stack: dict[str, Any], one: dict[str, Any], tmp_path: Path
) -> None:
    cards = [
        dataclasses.replace(nature_spec(name), **changes)
        for name, changes in (("many", stack), ("one", one))
    ]
    hub = write_hub(tmp_path / "hub", cards)
    message = r"asks for a stack of [36] grey frames, of which encoder 'one', which sees one frame"
    with pytest.raises(ValueError, match=message):
        image_format(str(hub))


def test_stacks_of_two_lengths_have_no_images_in_common(tmp_path: Path) -> None:
    given = [(tmp_path / f"see{n}.zip", n) for n in (4, 2)]
    for file, n in given:
        env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=n, channel_first=True)
        PPO("CnnPolicy", env, seed=0).save(file)
    add_encoder(tmp_path / "hub", *from_sb3(given[0][0], MIT))
    before = (tmp_path / "hub" / "hub.yaml").read_bytes()
    message = (
        "encoder 'see2' takes 2 channels, but 'see4' of the hub 4 channels: no images suit both; "
        "begin another hub with it"
    )
    with pytest.raises(ValueError, match=message):
        add_encoder(tmp_path / "hub", *from_sb3(given[1][0], MIT))
    assert (tmp_path / "hub" / "hub.yaml").read_bytes() == before
    assert not (tmp_path / "hub" / "see2.safetensors").exists()


def run_of(folder: Path, algorithm: str, hub: str, **overrides: Any) -> Any:
    """The folder of a run whose agent has learned something, and the agent."""
    values = {key.replace("__", "."): value for key, value in overrides.items()}
    config = resolve(small_config(algorithm, {"hub.name": hub, **values}))
    model = build_model(config, small_env(algorithm=algorithm, size=84 if hub == "none" else 36))
    with torch.no_grad():
        for weight in model.policy.parameters():
            weight += 0.01 * torch.randn_like(weight)
    create_run(folder, config)
    save_checkpoint(model, checkpoint_dir(folder, "last"), {})
    return model


@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_an_encoder_that_a_run_has_trained(algorithm: str, hub5: Path, tmp_path: Path) -> None:
    model = run_of(tmp_path / "run", algorithm, str(hub5), hub__freeze=["b"])
    card, tensors = from_run(f"{tmp_path / 'run'}:c", Wishes())
    assert (card.license, card.image_size) == ("MIT", (36, 36))
    assert card.name.startswith("c_hubrl_tinyimage")
    assert card.source == ("encoder c of the hub hub5 (random numbers), trained by hubrl train")
    assert card.pretraining["objective"] == algorithm
    add_encoder(tmp_path / "mine", card, tensors)
    hub = load_hub(tmp_path / "mine")
    images = torch.randint(0, 256, (3, 4, 36, 36), dtype=torch.uint8)
    owner = model.policy if algorithm == "ppo" else model.policy.actor
    theirs = owner.features_extractor.pathway.encoders[2]
    with torch.no_grad():
        torch.testing.assert_close(build_encoder(hub, hub.encoders[0])(images), theirs(images))
    with pytest.raises(ValueError, match=r"has the encoders a, b, c, d, e: choose one, as .*run:a"):
        from_run(str(tmp_path / "run"), MIT)
    with pytest.raises(ValueError, match=r"encoder 'b' was frozen in .*run, which has not trained"):
        from_run(f"{tmp_path / 'run'}:b", MIT)
    assert from_run(f"{tmp_path / 'run'}:a", MIT._replace(image_size=44)).card.features_dim == 256
    policy = {"features_extractor.cnn": torch.zeros(1)}  # of a stranger's checkpoint
    with pytest.raises(ValueError, match="its checkpoint lacks encoder 'c'; put the file back"):
        _hub_tensors(policy, load_hub(hub5).encoders[2], tmp_path)
    with pytest.raises(ValueError, match="hub 'hub5' has no encoder 'z'"):
        from_run(f"{tmp_path / 'run'}:z", MIT)
    with pytest.raises(ValueError, match="a model of a run's hub is its own; leave --architecture"):
        from_run(f"{tmp_path / 'run'}:a", MIT._replace(architecture="nature_conv"))


def test_a_card_that_has_changed_since_the_run(hub5: Path, tmp_path: Path) -> None:
    run_of(tmp_path / "run", "ppo", str(hub5))
    hub = load_hub(hub5)
    cards = tuple(dataclasses.replace(spec, mean=(0.5,)) for spec in hub.encoders)
    save_hub(dataclasses.replace(hub, encoders=cards), hub5)
    message = r"run was trained with mean \[0.0\] of encoder 'c', but its hub's card says \(0.5,\)"
    with pytest.raises(ValueError, match=message):
        from_run(f"{tmp_path / 'run'}:c", MIT)


def test_random_weights_that_a_run_has_trained(hub5: Path, tmp_path: Path) -> None:
    run_of(tmp_path / "run", "ppo", str(hub5), hub__random_init=True)
    card, _ = from_run(f"{tmp_path / 'run'}:c", Wishes())
    assert card.source == "random weights of nature_conv, trained by hubrl train"
    assert not card.is_licensed


def test_the_encoder_of_a_run_without_a_hub(tmp_path: Path) -> None:
    model = run_of(tmp_path / "run", "dqn", "none")
    add = ("add", tmp_path / "mine", "--from-run", tmp_path / "run", "--name", "own")
    assert "'own' has no licence: give --license" in call_hubs(*add).err
    assert call_hubs(*add, "--license", "MIT").code == 0
    hub = load_hub(tmp_path / "mine")
    (card,) = hub.encoders
    assert (card.name, card.architecture, card.image_size) == ("own", "nature_cnn", (84, 84))
    images = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    with torch.no_grad():
        features = build_encoder(hub, card)(images)
        torch.testing.assert_close(features, model.policy.q_net.features_extractor(images))
    with pytest.raises(ValueError, match="run has no hub: leave :a out"):
        from_run(f"{tmp_path / 'run'}:a", MIT)
    with pytest.raises(ValueError, match="nowhere is not the folder of a run"):
        from_run("nowhere", MIT)


class Robot(Env[Any, Any]):
    """Images and numbers beside them."""

    action_space = spaces.Discrete(2)

    def __init__(self, *images: str) -> None:
        views = {name: spaces.Box(0, 255, (36, 44, 1), np.uint8) for name in images}
        self.observation_space = spaces.Dict(
            {"place": spaces.Box(-1, 1, (2,), np.float32), **views}
        )


def test_the_image_among_several_observations(tmp_path: Path) -> None:
    model = PPO("MultiInputPolicy", Robot("camera 1"))
    model.save(tmp_path / "robot.zip")
    card, tensors = from_sb3(tmp_path / "robot.zip", MIT)
    assert (card.features_dim, card.image_size) == (256, (36, 44))
    assert (card.channels, card.frames) == (1, "last")
    theirs = model.policy.features_extractor.extractors["camera 1"].state_dict()
    assert tensors.keys() == theirs.keys()
    assert all(torch.equal(tensors[key], theirs[key]) for key in theirs)
    PPO("MultiInputPolicy", Robot("left", "right")).save(tmp_path / "robot.zip")
    with pytest.raises(ValueError, match=r"agent sees 2 images \(left, right\), but an encoder is"):
        from_sb3(tmp_path / "robot.zip", MIT)


def test_other_pixels_than_a_hub_gives(tmp_path: Path) -> None:
    saved_agent(PPO, tmp_path / "agent.zip", normalize_images=False)
    with pytest.raises(ValueError, match=r"agent with normalize_images=False: its encoder wants"):
        from_sb3(tmp_path / "agent.zip", MIT)


def nature_tensors(size: int = 3136, prefix: str = "features_extractor.") -> dict[str, Tensor]:
    shapes = {"cnn.0": (32, 4, 8, 8), "cnn.2": (64, 32, 4, 4), "cnn.4": (64, 64, 3, 3)}
    shapes["linear.0"] = (512, size)
    tensors = {f"{prefix}{key}.weight": torch.rand(shape) for key, shape in shapes.items()}
    return tensors | {f"{prefix}{key}.bias": torch.rand(s[0]) for key, s in shapes.items()}


def agent_zip(file: Path, policy: dict[str, Any], data: bytes = b"{}") -> Path:
    stream = io.BytesIO()
    torch.save(policy, stream)
    return zip_of(file, policy_pth=stream.getvalue(), data=data)


@pytest.mark.parametrize("size", [36, 40, 84, 100])
def test_an_image_size_that_is_not_told_follows_from_the_weights(size: int, tmp_path: Path) -> None:
    """The smallest that gives as many features."""
    file = tmp_path / "agent.zip"
    model = saved_agent(PPO, file, (size, size))
    assert from_sb3(file, MIT).card.image_size == (size, size)
    found = from_sb3(agent_zip(file, model.policy.state_dict()), MIT).card.image_size[0]
    assert found <= size < found + 8
    wide = agent_zip(file, nature_tensors(64 * 2))
    with pytest.raises(ValueError, match="its images are not square, and its observation space do"):
        from_sb3(wide, MIT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cnn.6.weight": torch.ones(1)}, r"other layers than SB3's NatureCNN: cnn.0, .*, cnn.6"),
        ({"cnn.0.weight": torch.ones(3)}, r"cnn.0.weight is torch.float32 of shape \(3,\), which"),
        ({"cnn.2.bias": torch.ones(64, dtype=torch.int64)}, r"cnn.2.bias is torch.int64 of shape"),
        ({"linear.0.weight": torch.ones(1).expand(2**20, 2**20)}, "would have .* bytes, too many"),
    ],
)
def test_layers_of_another_network(change: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    changed = {f"features_extractor.{key}": tensor for key, tensor in change.items()}
    with pytest.raises(ValueError, match=message):
        from_sb3(agent_zip(tmp_path / "agent.zip", nature_tensors() | changed), MIT)


@pytest.mark.parametrize("data", [b"[]", b"[" * 100_000, b"\xff"])
def test_data_that_are_not_an_agents(data: bytes, tmp_path: Path) -> None:
    file = agent_zip(tmp_path / "agent.zip", nature_tensors(), data)
    with pytest.raises(ValueError, match="its data are not what Stable-Baselines3 writes"):
        from_sb3(file, MIT)


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
        with pytest.raises(ValueError, match=r"evil\.zip: policy\.pth ") as refusal:
            from_sb3(file, MIT)
        assert "set to `False`" not in str(refusal.value), "no advice to run it nevertheless"
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04" + bytes(40)])
def test_files_that_are_no_agent(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ValueError, match="is no agent saved by Stable-Baselines3"):
        from_sb3(tmp_path / "x.zip", MIT)
    with pytest.raises(ValueError, match="is no agent saved by Stable-Baselines3"):
        from_sb3(zip_of(tmp_path / "empty.zip"), MIT)


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hubrl.saved_agents.MAX_UNPACKED", 1000)
    file = zip_of(tmp_path / "bomb.zip", policy_pth=bytes(1001))
    with pytest.raises(ValueError, match=r"would unpack to 1,001 bytes, too many"):
        from_sb3(file, MIT)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2000))
    with pytest.raises(ValueError, match=r"policy.pth .* would unpack to 2,000 bytes, too many"):
        from_sb3(zip_of(file, policy_pth=inner.getvalue()), MIT)


def test_zips_that_shrink_too_much_or_otherwise(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("policy.pth", bytes(2_000_000))
        archive.writestr("data", bytes(100))
    with pytest.raises(ValueError, match=r"policy\.pth would unpack to 2,000,000 bytes, too many"):
        policy_tensors(tmp_path / "bomb.zip")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data", bytes(64 * 1024**2 + 1))
    with pytest.raises(ValueError, match="data would unpack to 67,108,865 bytes, too many"):
        agent_data(tmp_path / "data.zip")
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("data", b"{}")
    with pytest.raises(ValueError, match="data is packed by method 14, allowed: stored or"):
        agent_data(tmp_path / "lzma.zip")


def test_types_that_are_no_weights(tmp_path: Path) -> None:
    save_file({"cnn.0.weight": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors: cnn\.0\.weight is torch\.complex64"):
        from_file(tmp_path / "x.safetensors", Wishes("x", "MIT", "nature_conv"))


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


def test_a_model_of_a_library_that_sees_each_frame(timm_file: Path, tmp_path: Path) -> None:
    """Whatever games it plays, they then give it a stack of four colour frames."""
    hub = tmp_path / "hub"
    options = ("--architecture", "timm:test_resnet", "--license", "MIT", "--image-size", 48)
    add = ("add", hub, "--from-file", timm_file, *options, "--n-frames", 4)
    outcome = call_hubs(*add)
    assert outcome.code == 0, outcome.err
    one, _ = from_file(timm_file, Wishes("x", "MIT", "timm:test_resnet", 48))
    spec = load_hub(hub)
    (card,) = spec.encoders
    assert (card.frames, card.n_frames, card.channels) == ("each", 4, 3)
    assert (one.frames, one.n_frames, card.features_dim) == ("last", 1, 4 * one.features_dim)
    assert image_format(str(hub)) == ImageFormat(size=48, grey=False, stack=4, min_size=24)
    images = torch.randint(0, 256, (2, 12, 48, 48), dtype=torch.uint8)
    theirs = timm.create_model("test_resnet", pretrained=False, num_classes=0).eval()
    theirs.load_state_dict(load_file(timm_file), strict=False)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (card.mean, card.std))
    with torch.no_grad():
        expected = [theirs((frame / 255.0 - mean) / std) for frame in images.split(3, dim=1)]
        found = build_encoder(spec, card)(images)
    torch.testing.assert_close(found, torch.cat(expected, dim=1), atol=1e-4, rtol=1e-4)


def test_stacks_of_colours_have_no_card(tmp_path: Path) -> None:
    for channels in (6, 12):
        env = FakeImageEnv(
            screen_height=36, screen_width=36, n_channels=channels, channel_first=True
        )
        PPO("CnnPolicy", env).save(tmp_path / "own.zip")
        message = f"own.zip is an agent of {channels} channels, {channels // 3} frames of colo"
        with pytest.raises(ValueError, match=message):
            from_sb3(tmp_path / "own.zip", MIT)


def test_frames_are_for_models_of_libraries(tmp_path: Path) -> None:
    saved_agent(PPO, tmp_path / "pong.zip")
    save_file({"cnn.0.weight": torch.zeros(32, 4, 8, 8)}, tmp_path / "net.safetensors")
    wishes = Wishes(license="MIT", n_frames=4)
    with pytest.raises(ValueError, match="n_frames is 4, but only a model of timm or torchvision"):
        from_sb3(tmp_path / "pong.zip", wishes)
    with pytest.raises(ValueError, match="sees frames one after the other; leave --n-frames out"):
        from_file(tmp_path / "net.safetensors", wishes._replace(architecture="nature_conv"))


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
        c.name: c.is_same for c in model.policy.features_extractor.pathway.encoders.changes()
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


def test_the_encoder_of_one_grey_frame_sees_the_newest(tmp_path: Path) -> None:
    """As out of an agent's zip; so it can stand beside encoders of a stack."""
    shapes = {"cnn.0": (32, 1, 8, 8), "cnn.2": (64, 32, 4, 4), "cnn.4": (64, 64, 3, 3)}
    tensors = {f"{layer}.weight": torch.zeros(shape) for layer, shape in shapes.items()}
    tensors |= {f"{layer}.bias": torch.zeros(shape[0]) for layer, shape in shapes.items()}
    save_file(tensors, tmp_path / "grey.safetensors")
    card, _ = from_file(tmp_path / "grey.safetensors", Wishes("x", "MIT", "nature_conv"))
    assert (card.channels, card.frames) == (1, "last")


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
    assert not (tmp_path / "hub").exists()


def test_a_transformer_of_another_size(tmp_path: Path) -> None:
    wishes = Wishes("x", "MIT", "torchvision:vit_b_32", 36)
    save_file({"x": torch.ones(1)}, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"image_size \[36, 36\] .* not fit architecture .*vit_b"):
        from_file(tmp_path / "vit.safetensors", wishes)


def test_a_model_without_a_linear_classifier(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "squeeze.safetensors")
    with pytest.raises(ValueError, match="'torchvision:squeezenet1_1' has no linear classifier"):
        from_file(
            tmp_path / "squeeze.safetensors", Wishes(architecture="torchvision:squeezenet1_1")
        )


def test_files_of_our_own_architectures(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    save_file(nature_tensors(64, prefix=""), file)
    card, tensors = from_file(file, MIT._replace(architecture="nature_cnn"))
    assert (card.image_size, card.features_dim, card.channels) == ((36, 36), 512, 4)
    add_encoder(tmp_path / "hub", card, tensors)
    card, tensors = from_file(file, MIT._replace(architecture="nature_conv", name="conv"))
    assert (card.image_size, card.features_dim) == ((36, 36), 64)
    save_file({"x": torch.ones(1), "linear.0.weight": torch.ones(())}, file)
    card, tensors = from_file(file, MIT._replace(architecture="nature_conv", name="other"))
    with pytest.raises(ValueError, match="of weights does not fit architecture 'nature_conv'"):
        add_encoder(tmp_path / "hub", card, tensors)
    assert load_hub(tmp_path / "hub").encoder_names == ("net",)


def timm_repository(config: dict[str, Any] | None = None) -> dict[str, bytes]:
    """What timm's repositories hold, of random numbers and with the classifier."""
    torch.manual_seed(0)
    pretrained = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 48, 48], "license": "mit"}
    config = config or {"architecture": "test_resnet", "pretrained_cfg": pretrained}
    weights = save(timm.create_model("test_resnet", pretrained=False).state_dict())
    return {"model.safetensors": weights, "config.json": json.dumps(config).encode()}


def test_a_timm_model_of_a_repository(hugging_face: Service, tmp_path: Path) -> None:
    hugging_face.repositories["someone/Net.1"] = timm_repository()
    hub = tmp_path / "hub"
    outcome = call_hubs("add", hub, "--from-hf", "someone/Net.1")
    assert outcome.code == 0, outcome.err
    (card,) = load_hub(hub).encoders
    assert (card.name, card.architecture, card.license) == ("net_1", "timm:test_resnet", "MIT")
    assert (card.image_size, card.mean, card.std) == ((48, 48), (0.5,) * 3, (0.25,) * 3)
    assert card.source == "https://huggingface.co/someone/Net.1"
    own = ("--image-size", 36, "--name", "own", "--architecture", "timm:test_resnet")
    file = "someone/Net.1/model.safetensors"
    assert "encoder 'own' has no licence" in call_hubs("add", hub, "--from-hf", file, *own).err
    assert call_hubs("add", hub, "--from-hf", file, *own, "--license", "MIT").code == 0
    assert load_hub(hub).encoders[1].image_size == (36, 36)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "has no hub.yaml and no config.json that names an architecture"),
        (
            {"architecture": "test_resnet", "pretrained_cfg": {"mean": 3}},
            r"https://huggingface.co/a/b: its config.json is wrong \('int' object is not iterable",
        ),
        ({"architecture": "resnet1"}, "timm has no model 'resnet1'"),
    ],
)
def test_repositories_of_other_kinds(
    hugging_face: Service, config: dict[str, Any], message: str
) -> None:
    hugging_face.repositories["a/b"] = timm_repository(config)
    with pytest.raises(ValueError, match=message):
        from_hf("a/b", MIT)
    del hugging_face.repositories["a/b"]["model.safetensors"]
    with pytest.raises(ValueError, match=r"a/b has no file model\.safetensors; look it"):
        from_hf("a/b", MIT._replace(architecture="timm:test_resnet"))


def test_an_encoder_of_a_shared_hub(hugging_face: Service, tmp_path: Path) -> None:
    theirs = write_hub(tmp_path / "theirs", [nature_spec("left"), nature_spec("right")])
    hugging_face.repositories["someone/pair"] = {
        file.name: file.read_bytes() for file in theirs.iterdir()
    }
    with pytest.raises(
        ValueError, match=r"which encoder of this hub\? Give someone/pair/FILE with"
    ):
        from_hf("someone/pair", Wishes())
    card, tensors = from_hf("someone/pair/right.safetensors", Wishes())
    add_encoder(tmp_path / "mine", card, tensors)
    (mine,), right = load_hub(tmp_path / "mine").encoders, load_hub(theirs).encoders[1]
    assert dataclasses.replace(mine, golden=None, sha256=right.sha256) == right
    with pytest.raises(ValueError, match="n_frames is 4, but only a model of timm"):
        from_hf("someone/pair/left.safetensors", Wishes(n_frames=4))
    card, _ = from_hf("someone/pair/left.safetensors", Wishes(name="Other", image_size=44))
    assert (card.name, card.license, card.features_dim) == ("other", "MIT", 256)


def test_a_timm_model_with_timms_weights(hugging_face: Service, tmp_path: Path) -> None:
    """Downloaded by timm itself; a transformer, whose positions timm fits to the size."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False)
    hugging_face.repositories["timm/test_vit.r160_in1k"] = {
        "model.safetensors": save(model.state_dict())
    }
    outcome = call_hubs("add", tmp_path, "--from-timm", "test_vit.r160_in1k", "--image-size", 32)
    assert outcome.code == 0, outcome.err
    (card,) = load_hub(tmp_path).encoders
    assert (card.name, card.architecture) == ("test_vit_r160_in1k", "timm:test_vit")
    assert (card.image_size, card.mean, card.license) == ((32, 32), (0.5,) * 3, "Apache-2.0")
    assert "/timm/test_vit.r160_in1k/resolve/" in "".join(hugging_face.requests)
    full, _ = from_timm("test_vit", Wishes())
    assert (full.image_size, full.features_dim) == ((160, 160), 64)


def test_timm_models_that_cannot_be_had(hugging_face: Service) -> None:
    with pytest.raises(ValueError, match=r"timm model 'test_vit': its weights can't be downloaded"):
        from_timm("test_vit", MIT)
    with pytest.raises(ValueError, match="timm has no pretrained weights of 'resnet50_mlp'"):
        from_timm("resnet50_mlp", MIT)
    with pytest.raises(
        ValueError, match=r"timm has no weights of model 'test_vit\.x': Invalid pre"
    ):
        from_timm("test_vit.x", MIT)
    with pytest.raises(ValueError, match=r"timm has no model 'resnet81' \(closest: 'resnet"):
        from_timm("resnet81", MIT)
    with pytest.raises(
        ValueError, match="architecture is 'nature_cnn', but a model of timm is its"
    ):
        from_timm("test_vit", MIT._replace(architecture="nature_cnn"))


@pytest.fixture
def torchvision_service(
    hugging_face: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Service:
    """The service that torchvision downloads from, with a file in the place of its only one."""
    torch.manual_seed(0)
    stream = io.BytesIO()
    torch.save(torchvision.models.get_model("shufflenet_v2_x0_5").state_dict(), stream)
    name = f"net-{hashlib.sha256(stream.getvalue()).hexdigest()[:8]}.pth"
    hugging_face.repositories["torch/vision"] = {name: stream.getvalue()}
    download = torch.hub.load_state_dict_from_url

    def local(url: str, **options: Any) -> Any:
        return download(f"{hugging_face.url}/torch/vision/resolve/main/{name}", **options)

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", local)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return hugging_face


def test_a_torchvision_model_with_its_weights(torchvision_service: Service, tmp_path: Path) -> None:
    """Downloaded by torchvision itself, which compares the hash in the file's name."""
    source = ("--from-torchvision", "shufflenet_v2_x0_5")
    assert "has no licence" in call_hubs("add", tmp_path / "hub", *source).err
    outcome = call_hubs("add", tmp_path / "hub", *source, "--license", "BSD-3-Clause")
    assert outcome.code == 0, outcome.err
    (card,) = load_hub(tmp_path / "hub").encoders
    assert (card.name, card.features_dim) == ("shufflenet_v2_x0_5", 1024)
    assert (card.image_size, card.mean) == ((224, 224), (0.485, 0.456, 0.406))
    assert card.source.startswith("torchvision ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1, https://")
    assert sum("/torch/vision/" in request for request in torchvision_service.requests) == 1


def test_torchvision_models_that_cannot_be_had(torchvision_service: Service) -> None:
    files = torchvision_service.repositories["torch/vision"]
    files |= dict.fromkeys(files, b"other")
    with pytest.raises(ValueError, match=r"its weights can't be downloaded \(invalid hash value"):
        from_torchvision("shufflenet_v2_x0_5", MIT)
    with pytest.raises(ValueError, match=r"torchvision has no classification model 'resnet81'"):
        from_torchvision("resnet81", MIT)
    with pytest.raises(ValueError, match="'nature_cnn', but a model of torchvision is its own"):
        from_torchvision("resnet18", MIT._replace(architecture="nature_cnn"))


def test_the_command_adds_and_says_what_is_wrong(tmp_path: Path) -> None:
    saved_agent(PPO, tmp_path / "ppo_pong.zip")
    source = ("--from-sb3", tmp_path / "ppo_pong.zip")
    hub = tmp_path / "my_hub"
    unlicensed = call_hubs("add", hub, *source, "--license", "unknown")
    assert unlicensed.code == 2
    assert "encoder 'ppo_pong' has no licence: give --license" in unlicensed.err
    assert not hub.exists()
    added = call_hubs("add", hub, *source, "--license", "MIT")
    assert "encoder ppo_pong, nature_cnn, 4 channels of 36x36 px" in added.out
    assert call_hubs("check", hub).code == 0
    for arguments, message in (
        ((*source, "--license", "MIT"), "name 'ppo_pong' was taken in the hub"),
        ((), "no source given, allowed: one of --from-run, --from-sb3"),
        ((*source, "--from-timm", "resnet18"), "--from-sb3 and --from-timm given, allowed: one of"),
        (("--from-hf", "only", "--license", "MIT"), "--from-hf only: give OWNER/NAME"),
    ):
        outcome = call_hubs("add", hub, *arguments)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert message in outcome.err


def test_weights_of_another_name_are_not_overwritten(timm_file: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    card, tensors = from_file(timm_file, Wishes("first", "MIT", "timm:test_resnet", 48))
    file = add_encoder(hub, card, tensors).rename(hub / "net.safetensors")
    (spec,) = load_hub(hub).encoders
    (hub / "hub.yaml").write_text(
        (hub / "hub.yaml").read_text().replace("first.safetensors", "./net.safetensors")
    )
    before = file.read_bytes()
    message = "net.safetensors in the hub .* has the weights of encoder 'first', and nothing was wr"
    with pytest.raises(ValueError, match=message):
        add_encoder(hub, dataclasses.replace(card, name="net"), tensors)
    assert file.read_bytes() == before
    build_encoder(load_hub(hub), dataclasses.replace(spec, weights="net.safetensors"))
    (hub / "other.safetensors").write_bytes(b"of a command that was killed before it wrote a card")
    add_encoder(hub, dataclasses.replace(card, name="other"), tensors)


def test_hubs_that_are_not_added_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is downloaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert "file is a file, allowed: a folder" in call_hubs("add", "file", "--from-timm", "x").err
    clash = call_hubs("add", "atari5", "--from-timm", "x").err
    assert "out atari5 is the name of a hub that ships with hubrl, allowed: another folder" in clash
    assert "hubrl hubs pull atari5 my_hub begins one of your own" in clash
