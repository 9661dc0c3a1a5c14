"""How well encoders, as they are, tell the returns of play that follow: a look before training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from hubrl.encoders import Encoder, build_encoder, check_image_shape
from hubrl.specs import HubSpec

# Shape letters: N observations, D features, T steps of play, B environments, G observations of one
# environment, C H W image.

DISCOUNT = 0.99
EVERY = 4  # neighbouring observations tell nearly the same
LOST = 0.1  # of a return: what the end of the play may cut off
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
STEADY = 1e-2  # of the features' root mean square deviation: what varies less than that is noise
INTERCEPT = 10.0  # so large a constant feature is hardly penalised
BATCH = 256
N_RESAMPLES = 2000


class Play(NamedTuple):
    """Observations of play and the returns that followed."""

    images_NCHW: Tensor
    """uint8."""
    returns_N: Tensor
    """Discounted rewards from here to the end of the episode, float64."""
    envs_N: Tensor
    """The environment that each is of, int64."""
    n_episodes: int


class Rank(NamedTuple):
    """How well an encoder's features tell returns."""

    encoder: str
    r2: float
    """Share of the variance that a linear readout explains in environments it was not fitted to."""
    low: float
    """Lower end of the 95 % bootstrap interval over environments."""
    high: float


def rank(hub: HubSpec, played: Play) -> list[Rank]:
    """
    The hub's encoders and one of random weights for each architecture, the best first.

    :raises ValueError: if an encoder can't be loaded or can't take the images or gives features
        that are no numbers, or if the returns are all the same
    """
    for spec in hub.encoders:
        check_image_shape(spec, tuple(played.images_NCHW.shape[1:]))
    if played.returns_N.std() == 0:
        raise ValueError(
            f"all returns are {played.returns_N[0]:g} in {len(played.returns_N):,} observations: "
            "nothing to tell apart; play longer (-n)"
        )
    ranks = []
    for name, encoder in _candidates(hub):
        features_ND = features_of(encoder, played.images_NCHW)
        if not features_ND.isfinite().all():
            raise ValueError(
                f"features of encoder {name!r} are NaN or infinite: rank without it, and see what "
                "`hubrl hubs check` says of its hub"
            )
        ranks.append(Rank(name, *explained(features_ND, played)))
    return sorted(ranks, key=lambda found: -found.r2)


def advice(ranks: Sequence[Rank], hub: HubSpec) -> tuple[str, str]:
    """
    The encoder to try first, and how sure that is, in words.

    :param ranks: what ``rank`` found of the hub
    """
    by_name = {found.encoder: found for found in ranks}
    architectures = {spec.name: spec.architecture for spec in hub.encoders}
    best = next(found for found in ranks if found.encoder in architectures)
    # Random weights were drawn once, and the best encoder was chosen by these very observations.
    if best.low > by_name[_random(architectures[best.encoder])].high:
        return best.encoder, "its features explain more of the returns than random weights do"
    return best.encoder, (
        "its features explain no more of the returns than random weights do, within the interval; "
        "encoders of which that was so have helped all the same"
    )


def play(env: VecEnv, n_observations: int, seed: int) -> Play:
    """
    Play at random and note every fourth observation.

    :param env: each of its environments gives the same number of observations
    :param n_observations: at least; rounded up to a multiple of the environments
    """
    n_kept = math.ceil(n_observations / env.num_envs)
    tail = math.ceil(math.log(LOST) / math.log(DISCOUNT))
    env.action_space.seed(seed)
    images: list[Tensor] = []
    rewards, dones = [], []
    observations = env.reset()
    for step in range(n_kept * EVERY + tail):
        if step % EVERY == 0 and len(images) < n_kept:
            images.append(torch.as_tensor(np.array(observations)))
        actions = np.stack([env.action_space.sample() for _ in range(env.num_envs)])
        observations, reward_B, done_B, _ = env.step(actions)
        rewards.append(reward_B)
        dones.append(done_B)
    returns_TB = discounted(np.array(rewards), np.array(dones))
    return Play(
        torch.stack(images).flatten(0, 1),
        torch.from_numpy(returns_TB[: n_kept * EVERY : EVERY].flatten()),
        torch.arange(env.num_envs).repeat(n_kept),
        int(np.sum(dones)),
    )


def discounted(rewards_TB: np.ndarray, dones_TB: np.ndarray) -> np.ndarray:
    """
    Discounted sum of the rewards from each step to the end of its episode, (T, B) float64.

    :param rewards_TB: what each step earned
    :param dones_TB: whether it was the last of its episode
    """
    returns_TB = np.zeros(rewards_TB.shape)
    later_B = np.zeros(rewards_TB.shape[1])
    for step in reversed(range(len(rewards_TB))):
        later_B = rewards_TB[step] + DISCOUNT * later_B * ~dones_TB[step]
        returns_TB[step] = later_B
    return returns_TB


def features_of(encoder: Encoder, images_NCHW: Tensor) -> Tensor:
    """Features (N, D) float32."""
    with torch.no_grad():
        batches = torch.split(images_NCHW, BATCH)
        return torch.cat([encoder(images_BCHW) for images_BCHW in batches])


def explained(features_ND: Tensor, played: Play) -> tuple[float, float, float]:
    """
    R2 of a ridge regression on environments that it was not fitted to, and its 95 % interval.

    The penalty is the best of ``PENALTIES``, for each encoder its own.
    """
    errors_N = min(
        (
            (held_out(features_ND, played.returns_N, played.envs_N, penalty) - played.returns_N)
            .square()
            .numpy()
            for penalty in PENALTIES
        ),
        key=np.sum,
    )
    spread_N = (played.returns_N - played.returns_N.mean()).square().numpy()
    envs_N = played.envs_N.numpy()
    sums_2G = np.stack([np.bincount(envs_N, values_N) for values_N in (errors_N, spread_N)])
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, sums_2G.shape[1], (N_RESAMPLES, sums_2G.shape[1]))
    errors, spread = sums_2G[:, drawn].sum(axis=-1)
    low, high = np.quantile(1 - errors / np.maximum(spread, 1e-12), [0.025, 0.975])
    return float(1 - errors_N.sum() / spread_N.sum()), float(low), float(high)


def held_out(features_ND: Tensor, targets_N: Tensor, envs_N: Tensor, penalty: float) -> Tensor:
    """
    What ridge regression predicts for each environment after a fit to all others, (N,) float64.

    One fit to all gives them all: with ``C = (K + penalty * N)^-1`` and ``a = C y`` the residuals
    of a left-out group are ``C_GG^-1 a_G`` (groups of one: Rasmussen and Williams 2006, eq. 5.12).

    :param features_ND: standardised here; those that hardly vary stay small
    :param targets_N: float64
    :param envs_N: the group of each
    :param penalty: of the squared weights, against the mean squared error
    """
    features_ND = features_ND.double()
    deviation_D = features_ND.std(dim=0, correction=0)
    scale_D = deviation_D + STEADY * deviation_D.square().mean().sqrt().clamp_min(1e-12)
    scaled_ND = (features_ND - features_ND.mean(dim=0)) / scale_D
    kernel_NN = scaled_ND @ scaled_ND.T / scaled_ND.shape[1] + INTERCEPT**2
    n = len(targets_N)
    factor_NN = torch.linalg.cholesky(kernel_NN + penalty * n * torch.eye(n, dtype=torch.float64))
    inverse_NN = torch.cholesky_inverse(factor_NN)
    dual_N = inverse_NN @ targets_N
    residual_N = torch.empty_like(targets_N)
    for env in range(int(envs_N.max()) + 1):
        rows_G = (envs_N == env).nonzero().flatten()
        residual_N[rows_G] = torch.linalg.solve(inverse_NN[rows_G][:, rows_G], dual_N[rows_G])
    return targets_N - residual_N


def _candidates(hub: HubSpec) -> Iterator[tuple[str, Encoder]]:
    for spec in hub.encoders:
        yield spec.name, build_encoder(hub, spec)
    for architecture in dict.fromkeys(spec.architecture for spec in hub.encoders):
        spec = next(spec for spec in hub.encoders if spec.architecture == architecture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield _random(architecture), build_encoder(hub, spec, pretrained=False)


def _random(architecture: str) -> str:
    return f"random {architecture}"
