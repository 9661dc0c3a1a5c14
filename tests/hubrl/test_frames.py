"""What an encoder sees of a stack: all frames, the newest, or each; against plain arithmetic."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st
from small_hubs import nature_spec, write_hub
from stable_baselines3 import PPO
from stable_baselines3.common.envs import FakeImageEnv
from torch import nn

import hubrl
from hubrl.encoders import Encoder, build_encoder, check_image_shape
from hubrl.games import image_format
from hubrl.hubs import check_encoder
from hubrl.specs import load_hub

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def spec_of(frames: str, channels: int, n_frames: int = 1, size: int = 8) -> hubrl.EncoderSpec:
    return dataclasses.replace(
        nature_spec("x", size),
        channels=channels,
        frames=frames,
        n_frames=n_frames,
        features_dim=64 * n_frames,
    )


def seen_by_hand(images_BCHW: np.ndarray, spec: hubrl.EncoderSpec) -> np.ndarray:
    """Rows that the trunk gets, by the words of the card."""
    pixels = images_BCHW.astype(np.float32) / 255
    colours = 3 if pixels.shape[1] % 3 == 0 else 1
    frames = np.split(pixels, pixels.shape[1] // colours, axis=1)
    if spec.frames == "each":
        frames = np.split(pixels, spec.n_frames, axis=1)
    if spec.frames == "last":
        rows = frames[-1]
    elif spec.frames == "each":
        rows = np.stack(frames, axis=1).reshape(-1, *frames[0].shape[1:])
    else:
        rows = pixels
    if rows.shape[1] == 1 and spec.channels == 3:
        rows = np.concatenate([rows] * 3, axis=1)
    if rows.shape[1] == 3 and spec.channels == 1:
        rows = (rows * LUMA[:, None, None]).sum(axis=1, keepdims=True)
    return rows


@given(
    frames=st.sampled_from(["stack", "last", "each"]),
    channels=st.sampled_from([1, 3, 4]),
    n_frames=st.sampled_from([1, 2, 3, 4, 5, 6]),
    colours=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
)
def test_an_encoder_sees_the_pixels_of_its_card(
    frames: str, channels: int, n_frames: int, colours: int, seed: int
) -> None:
    if frames != "stack" and channels == 4:
        channels = 1
    spec = spec_of(frames, channels, n_frames if frames == "each" else 1)
    images = np.random.default_rng(seed).integers(
        256, size=(3, n_frames * colours, 8, 8), dtype=np.uint8
    )
    try:
        check_image_shape(spec, images.shape[1:])
    except ValueError:
        # Refused only where no frame or stack can become the channels.
        rows = seen_by_hand(images, spec).shape[1]
        assert rows != channels
        return
    encoder = Encoder(spec, nn.Flatten())
    seen = encoder.preprocess(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(seen, seen_by_hand(images, spec), atol=1e-6)


def test_features_of_each_frame_follow_each_other(tmp_path: Path) -> None:
    card = spec_of("each", 1, 4, size=36)
    hub = load_hub(write_hub(tmp_path / "hub", [card]))
    encoder = build_encoder(hub, hub.encoders[0])
    images = torch.randint(0, 256, (2, 4, 36, 36), dtype=torch.uint8)
    with torch.no_grad():
        features = encoder(images)
        single = [encoder.trunk(images[:, i : i + 1] / 255.0) for i in range(4)]
    torch.testing.assert_close(features, torch.cat(single, dim=1))
    assert all(check.holds or check.name == "golden" for check in check_encoder(encoder))
    assert image_format(str(tmp_path / "hub")).stack == 4


def test_three_grey_frames_are_no_colour(tmp_path: Path) -> None:
    """The newest frame would be made of three."""
    each, last = spec_of("each", 3, 3, size=36), spec_of("last", 3, size=36)
    specs = [nature_spec("grey"), dataclasses.replace(each, name="each"), last]
    specs[0] = dataclasses.replace(specs[0], channels=1, frames="last")
    hub = str(write_hub(tmp_path / "hub", specs))
    with pytest.raises(ValueError, match=r"a stack of 3 grey frames, of which encoder 'grey'"):
        image_format(hub)
    assert image_format(f"{hub}:each").stack == 3


def test_frame_policies_side_by_side_drive_an_agent(tmp_path: Path) -> None:
    each = spec_of("each", 3, 4, size=36)
    last = spec_of("last", 3, size=36)
    specs = [
        nature_spec("stack"),
        dataclasses.replace(each, name="each"),
        dataclasses.replace(last, name="last"),
    ]
    env = FakeImageEnv(screen_height=36, screen_width=36, n_channels=4, channel_first=True)
    kwargs = {"hub": str(write_hub(tmp_path / "hub", specs)), "top_k": 3, "precision": "float32"}
    policy_kwargs = {
        "features_extractor_class": hubrl.HubFeaturesExtractor,
        "features_extractor_kwargs": kwargs,
        "net_arch": [],
    }
    model = PPO("CnnPolicy", env, n_steps=32, batch_size=16, policy_kwargs=policy_kwargs)
    model.learn(32)
    weights = [list(e.parameters()) for e in model.policy.features_extractor.pathway.encoders]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for ps in weights for p in ps)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 8, 8), r"3 channels, but encoder 'x' takes 4 frames, grey or RGB: 4 or 12 channels"),
        ((5, 8, 8), r"5 channels, but encoder 'x' takes 4 frames.*stack 4 grey frames"),
        ((8, 8, 3), r"shape \(8, 8, 3\), channels last, .* VecTransposeImage"),
    ],
)
def test_stacks_that_an_encoder_of_each_frame_refuses(shape: Any, message: str) -> None:
    card = spec_of("each", 3, 4)
    with pytest.raises(ValueError, match=message):
        check_image_shape(card, shape)


def test_float_images_beyond_one_are_refused(hub5: Path) -> None:
    """SB3 divides bytes alone."""
    hundred = spaces.Box(0.0, 255.0, (4, 36, 36), np.float32)
    message = r"observation space is float32 and its bounds reach 255, but float images must lie"
    with pytest.raises(ValueError, match=message):
        hubrl.HubFeaturesExtractor(hundred, hub=hub5)
    unbounded = spaces.Box(-np.inf, np.inf, (4, 36, 36), np.float32)
    extractor = hubrl.HubFeaturesExtractor(unbounded, hub=hub5)
    extractor(torch.zeros(1, 4, 36, 36))  # black tells nothing
    with pytest.raises(ValueError, match="observations reach 255, but float images must lie"):
        extractor(torch.full((1, 4, 36, 36), 255.0))
    with pytest.raises(ValueError, match="observations reach -1, but float images must lie"):
        hubrl.HubFeaturesExtractor(unbounded, hub=hub5)(torch.full((1, 4, 36, 36), -1.0))
