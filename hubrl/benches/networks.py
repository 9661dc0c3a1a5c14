"""Networks alone: dispatch against all encoders, generator against one, kept features."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from hubrl.benches.measuring import Result, compare, interleave, timed
from hubrl.encoders import Casts, build_encoder
from hubrl.files import file_sha256
from hubrl.pathway import HubPathway, rows_of_encoders
from hubrl.precision import resolve_precision
from hubrl.replay import FeatureCache, RoutingReplay
from hubrl.specs import EncoderSpec, HubSpec, save_hub

# Shape letters: B batch, N rows of a rollout, R rows that activate one encoder, E encoders,
# K top k, D features of one encoder, C H W image.

N_ENCODERS = 5
TOP_K = 2
# Routes evenly, which costs most: a fresh generator alone may send all images to the same two.
NOISE = 100.0


class Side(NamedTuple):
    """A pathway, and how its features are computed."""

    pathway: HubPathway
    features: Callable[[Tensor, Casts | None], Tensor]


def measure_dispatch(device: str = "cpu") -> list[Result]:
    """Two of five NatureCNN routed, generator included, against all five; 32: in float32."""
    return [
        update("dispatch.update", device=device),
        update("dispatch.update32", precision="float32", device=device),
        rollout("dispatch.rollout", batch=16, device=device),
        rollout("dispatch.rollout8", batch=8, device=device),
    ]


def measure_generator(batch: int = 256, rounds: int = 101, device: str = "cpu") -> list[Result]:
    """The pathway generator's forward pass against that of one NatureCNN, images converted."""
    torch.manual_seed(0)
    pathway = HubPathway(random_hub(N_ENCODERS), TOP_K).to(device)
    spec = dataclasses.replace(random_spec("one"), architecture="nature_cnn", features_dim=512)
    encoder = build_encoder(HubSpec(name="one", encoders=(spec,)), spec).to(device)
    dtype = resolve_precision("auto", device)
    images_BCHW = random_images(batch).to(device).float() / 255.0
    noise_BE = torch.randn(batch, N_ENCODERS, device=device)
    encoder_images_BCHW = images_BCHW.to(dtype)
    with torch.no_grad():
        result = _in_turns(
            "generator",
            lambda: pathway.generator(images_BCHW, noise_BE),
            lambda: encoder(encoder_images_BCHW, dtype),
            rounds,
            warm_up=10,
        )
    return [result]


def measure_cache(
    n_steps: int = 128, n_envs: int = 8, rounds: int = 7, device: str = "cpu"
) -> list[Result]:
    """
    Frozen encoders in an iteration of PPO with four epochs: features kept, or computed each time.

    Encoders alone, dispatch included: a rollout in steps of ``n_envs`` rows, then four minibatches
    in each epoch. The limit is a fifth if a row costs the same in both.
    """
    torch.manual_seed(0)
    images_NCHW = random_images(n_steps * n_envs).to(device)
    rollout = Rollout(
        HubPathway(random_hub(N_ENCODERS), TOP_K, precision="auto").to(device),
        images_NCHW,
        RoutingReplay(N_ENCODERS).hash(images_NCHW),
        torch.rand(len(images_NCHW), N_ENCODERS, device=device).topk(TOP_K).indices,
    )

    def iterate(cache: FeatureCache | None) -> None:
        rollout.collect(n_steps, cache)
        for _ in range(4):
            rollout.look_again(cache)

    with torch.no_grad():
        ours, theirs = (lambda: iterate(FeatureCache())), (lambda: iterate(None))
        return [_in_turns("cache", ours, theirs, rounds, warm_up=1)]


class Rollout(NamedTuple):
    """Observations of a rollout, and the encoders that they activate."""

    pathway: HubPathway
    images_NCHW: Tensor
    hash_N: Tensor
    activated_NK: Tensor

    def collect(self, n_steps: int, cache: FeatureCache | None) -> None:
        """Features of all observations, step by step."""
        casts = Casts()
        for rows_B in self._rows(torch.arange).chunk(n_steps):
            for i, rows_R in self._dispatched(rows_B):
                features_RD = self.pathway.encode(i, self.images_NCHW, rows_R, casts)
                if cache is not None:
                    cache.store(i, self.hash_N[rows_R], features_RD)

    def look_again(self, cache: FeatureCache | None) -> None:
        """The same in four minibatches, as in an epoch of the update."""
        for rows_B in self._rows(torch.randperm).chunk(4):
            for i, rows_R in self._dispatched(rows_B):
                if cache is None:
                    self.pathway.encode(i, self.images_NCHW, rows_R)
                else:
                    cache.find(i, self.hash_N[rows_R])

    def _rows(self, order: Callable[..., Tensor]) -> Tensor:
        return order(len(self.images_NCHW), device=self.images_NCHW.device)

    def _dispatched(self, rows_B: Tensor) -> Iterator[tuple[int, Tensor]]:
        for i, places_R in enumerate(rows_of_encoders(self.activated_NK[rows_B], N_ENCODERS)):
            yield i, rows_B[places_R]


def update(
    name: str, batch: int = 256, precision: str = "auto", rounds: int = 15, device: str = "cpu"
) -> Result:
    """Forward and backward, as for a minibatch of an update."""
    images_BCHW = random_images(batch).to(device)

    def learn(side: Side) -> None:
        side.pathway.zero_grad()
        side.features(images_BCHW, None).sum().backward()

    return _compare(name, learn, precision, rounds, device)


def rollout(name: str, batch: int, rounds: int = 101, device: str = "cpu") -> Result:
    """Forward alone, as for a step of a rollout: both sides keep the casts of their weights."""
    images_BCHW = random_images(batch).to(device)
    casts: dict[Side, Casts] = defaultdict(Casts)

    def collect(side: Side) -> None:
        with torch.no_grad():
            side.features(images_BCHW, casts[side])

    return _compare(name, collect, "auto", rounds, device)


def random_spec(name: str) -> EncoderSpec:
    """A card of NatureCNN's convolutions, without weights: speed doesn't depend on them."""
    return EncoderSpec(
        name=name,
        architecture="nature_conv",
        features_dim=3136,
        image_size=(84, 84),
        channels=4,
        license="MIT",
        source="random numbers",
    )


def random_hub(n_encoders: int) -> HubSpec:
    """A hub of such encoders."""
    encoders = tuple(random_spec(f"encoder{i}") for i in range(n_encoders))
    return HubSpec(name=f"random{n_encoders}", encoders=encoders)


def save_random_hub(folder: Path, n_encoders: int) -> Path:
    """The same with weight files, so that frozen encoders are shared as those of any hub."""
    hub = random_hub(n_encoders)
    folder.mkdir()
    specs = []
    for spec in hub.encoders:
        file = folder / f"{spec.name}.safetensors"
        save_file(build_encoder(hub, spec).trunk.state_dict(), file)
        specs.append(dataclasses.replace(spec, weights=file.name, sha256=file_sha256(file)))
    save_hub(dataclasses.replace(hub, encoders=tuple(specs)), folder)
    return folder


def random_images(batch: int) -> Tensor:
    """(B, 4, 84, 84) uint8."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 4, 84, 84), dtype=torch.uint8, generator=generator)


def _routed(precision: str, device: str) -> Side:
    pathway = HubPathway(random_hub(N_ENCODERS), TOP_K, precision=precision).to(device)

    def features(images_BCHW: Tensor, casts: Casts | None) -> Tensor:
        noise_BE = NOISE * torch.randn(len(images_BCHW), N_ENCODERS, device=device)
        return pathway.route(images_BCHW, noise_BE, casts=casts).features

    return Side(pathway, features)


def _dense(precision: str, device: str) -> Side:
    """What a user would run instead has no generator: all encoders with equal weights."""
    pathway = HubPathway(random_hub(N_ENCODERS), N_ENCODERS, precision=precision).to(device)

    def features(images_BCHW: Tensor, casts: Casts | None) -> Tensor:
        shape = (len(images_BCHW), N_ENCODERS)
        equal_BE = torch.full(shape, 1 / N_ENCODERS, device=device)
        all_BE = torch.arange(N_ENCODERS, device=device).expand(shape)
        return pathway.aggregate(images_BCHW, equal_BE, all_BE, casts=casts)

    return Side(pathway, features)


def _compare(
    name: str, run: Callable[[Side], None], precision: str, rounds: int, device: str
) -> Result:
    torch.manual_seed(0)
    ours, theirs = _routed(precision, device), _dense(precision, device)
    return _in_turns(name, lambda: run(ours), lambda: run(theirs), rounds)


def _in_turns(
    name: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    warm_up: int = 2,
) -> Result:
    """Milliseconds of both sides."""
    seconds = interleave({"ours": timed(ours), "theirs": timed(theirs)}, rounds, warm_up)
    return compare(name, 1e3 * seconds["ours"], 1e3 * seconds["theirs"], "ms")
