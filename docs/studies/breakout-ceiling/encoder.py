"""
A hub of one encoder that was taught where Breakout's ball and paddle are: no transfer, a ceiling.

    python docs/studies/breakout-ceiling/encoder.py studies/hubs/ceiling

The convolutions learn to tell three numbers of the emulator's memory from observations of random
play, by a linear layer over all features. So an agent that starts from them finds in its features,
linearly, what no encoder of other games could know better.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ale_py
import gymnasium
import numpy as np
import torch
from gymnasium.wrappers import FrameStackObservation
from safetensors.torch import save_file
from stable_baselines3.common.atari_wrappers import AtariWrapper
from torch import Tensor, nn

from hubrl.encoders import Encoder, build_encoder
from hubrl.files import file_sha256
from hubrl.specs import EncoderSpec, HubSpec, save_hub

N_OBSERVATIONS = 24_000
EVERY = 3  # steps from one observation that is kept to the next
BALL_X, BALL_Y, PADDLE_X = 99, 101, 72  # bytes of the memory (AtariARI, arXiv 1906.08226)
IN_PLAY = range(101, 190)  # BALL_Y below the wall; elsewhere the ball may not be on screen
N_UPDATES = 1_500
BATCH = 128

gymnasium.register_envs(ale_py)


def main(folder: Path) -> None:
    """Write the hub to ``folder``."""
    images_NCHW, places_N3 = play()
    spec = EncoderSpec(
        name="ceiling",
        architecture="nature_conv",
        features_dim=3136,
        image_size=(84, 84),
        channels=4,
        license="MIT",
        source="docs/studies/breakout-ceiling/encoder.py",
    )
    torch.manual_seed(0)
    encoder = build_encoder(HubSpec(name="ceiling", encoders=(spec,)), spec)
    errors_3 = teach(encoder, images_NCHW, places_N3)
    print("root mean square errors in pixels:", *(f"{error:.1f}" for error in errors_3))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "ceiling.safetensors"
    save_file(encoder.trunk.state_dict(), file)
    card = {"weights": file.name, "sha256": file_sha256(file)}
    fields = {name: getattr(spec, name) for name in EncoderSpec.__slots__}
    save_hub(HubSpec(name="ceiling", encoders=(EncoderSpec(**{**fields, **card}),)), folder)


def play() -> tuple[Tensor, Tensor]:
    """Observations of random play (N, 4, 84, 84) uint8, and where ball and paddle are (N, 3)."""
    env = AtariWrapper(
        gymnasium.make("BreakoutNoFrameskip-v4"), terminal_on_life_loss=False, clip_reward=False
    )
    stacked = FrameStackObservation(env, 4, padding_type="zero")
    rng = np.random.default_rng(0)
    images: list[np.ndarray] = []
    memories: list[np.ndarray] = []
    stacked.reset(seed=0)
    step = 0
    while len(images) < N_OBSERVATIONS:
        step += 1
        observation, _, terminated, truncated, _ = stacked.step(int(rng.integers(4)))
        if terminated or truncated:
            stacked.reset()
        elif step % EVERY == 0:
            images.append(np.array(observation)[..., 0])
            memories.append(env.unwrapped.ale.getRAM())  # type: ignore[attr-defined]
    memory = np.stack(memories)
    kept = np.isin(memory[:, BALL_Y], IN_PLAY)
    places = memory[kept][:, [BALL_X, BALL_Y, PADDLE_X]].astype(np.float32)
    return torch.from_numpy(np.stack(images)[kept]), torch.from_numpy(places)


def teach(encoder: Encoder, images_NCHW: Tensor, places_N3: Tensor) -> list[float]:
    """Train it on nine tenths; the errors on the last tenth."""
    scale_3 = places_N3.std(dim=0)
    targets_N3 = (places_N3 - places_N3.mean(dim=0)) / scale_3
    n_seen = len(images_NCHW) * 9 // 10
    head = nn.Linear(encoder.spec.features_dim, 3)
    nn.init.zeros_(head.weight)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-3, N_UPDATES)
    for _ in range(N_UPDATES):
        rows_B = torch.randint(n_seen, (BATCH,))
        features_BD = encoder(images_NCHW[rows_B], torch.bfloat16).float()
        loss = (head(features_BD) - targets_N3[rows_B]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found_N3 = torch.cat(
            [head(encoder(images)) for images in torch.split(images_NCHW[n_seen:], 256)]
        )
    errors_3: list[float] = (
        (found_N3 - targets_N3[n_seen:]).square().mean(dim=0).sqrt() * scale_3
    ).tolist()
    return errors_3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
