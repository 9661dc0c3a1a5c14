"""The table of algorithms, and the function that builds a model from a run's configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from sb3_contrib import QRDQN, TQC, CrossQ, MaskablePPO, RecurrentPPO
from sb3_contrib.crossq.policies import CrossQPolicy
from sb3_contrib.tqc import policies as tqc
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.sac import policies as sac
from stable_baselines3.td3 import policies as td3
from torch.optim import Adam

from agents.config import AnySection, HubSection, RunConfig
from agents.policies import (
    ActorCriticImagePolicy,
    BaselineCNN,
    DQNImagePolicy,
    MaskableImagePolicy,
    QRDQNImagePolicy,
    RecurrentImagePolicy,
)
from agents.rollout_buffer import DeviceRolloutBuffer
from hubrl.aggregation import aggregation_name
from hubrl.extractor import HubFeaturesExtractor, steady_encoders
from hubrl.optimizer import EncoderScaledAdam
from hubrl.pathway import always_active_names, frozen_names, number_activated
from hubrl.precision import check_device, resolve_precision
from hubrl.specs import HubSpec, lasting_name, load_hub


class Algorithm(NamedTuple):
    """How an algorithm of SB3 is made from its section of the configuration."""

    model: type[BaseAlgorithm]
    policy: type[BasePolicy]
    action_spaces: tuple[type[spaces.Space[Any]], ...]
    #: fields of the section that SB3 takes as ``policy_kwargs``
    policy_fields: tuple[str, ...] = ()
    policy_kwargs: Mapping[str, Any] = {}
    #: what SB3 gives Adam for this algorithm, from its section; None: it has no Adam
    adam: Callable[[Any], dict[str, Any]] | None = lambda section: {}


DISCRETE, CONTINUOUS = (spaces.Discrete,), (spaces.Box,)
BOX_OR_DISCRETE = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete)
COUNTABLE = (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
ANY_ACTION = (spaces.Box, *COUNTABLE)


def _ppo_adam(section: object) -> dict[str, Any]:
    return {"eps": 1e-5}


#: Keys are the names in ``agents.config``.
ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(PPO, ActorCriticImagePolicy, ANY_ACTION, adam=_ppo_adam),
    "a2c": Algorithm(
        A2C,
        ActorCriticImagePolicy,
        ANY_ACTION,
        # As in TensorFlow, and in rl-zoo: torch's RMSprop makes A2C unstable on Atari.
        policy_kwargs={"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}},
        adam=None,
    ),
    "dqn": Algorithm(DQN, DQNImagePolicy, DISCRETE),
    "qrdqn": Algorithm(
        QRDQN,
        QRDQNImagePolicy,
        DISCRETE,
        policy_fields=("n_quantiles",),
        adam=lambda section: {"eps": 0.01 / section.batch_size},
    ),
    "sac": Algorithm(SAC, sac.CnnPolicy, CONTINUOUS, ("net_arch",)),
    "td3": Algorithm(TD3, td3.CnnPolicy, CONTINUOUS, ("net_arch",)),
    "ddpg": Algorithm(DDPG, td3.CnnPolicy, CONTINUOUS, ("net_arch",)),
    "tqc": Algorithm(TQC, tqc.CnnPolicy, CONTINUOUS, ("net_arch", "n_quantiles", "n_critics")),
    # It has a policy for vectors alone, whose features extractor may be any.
    "crossq": Algorithm(
        CrossQ,
        CrossQPolicy,
        CONTINUOUS,
        ("net_arch",),
        adam=lambda section: {"betas": (0.5, 0.999)},
    ),
    "maskable_ppo": Algorithm(MaskablePPO, MaskableImagePolicy, COUNTABLE, adam=_ppo_adam),
    "recurrent_ppo": Algorithm(
        RecurrentPPO,
        RecurrentImagePolicy,
        BOX_OR_DISCRETE,
        policy_fields=("lstm_hidden_size",),
        adam=_ppo_adam,
    ),
}


#: The least that SB3's algorithms take, whatever the number of environments.
NO_ROOM = {"buffer_size": 1, "n_steps": 2, "batch_size": 2}


def build_model(config: RunConfig, env: VecEnv, *, learns: bool = True) -> BaseAlgorithm:
    """
    The untrained model of a run.

    :param config: of the run
    :param env: where it learns, or what its spaces are taken from
    :param learns: else it only plays, and has no room for what it would learn from
    :raises ValueError: if the hub, an encoder, ``top_k`` or a space doesn't fit
    """
    algorithm = ALGORITHMS[config.algorithm.name]
    if not isinstance(env.action_space, algorithm.action_spaces):
        allowed = " or ".join(space.__name__ for space in algorithm.action_spaces)
        raise ValueError(
            f"algorithm.name {config.algorithm.name!r} takes {allowed} actions, "
            f"but env {config.env.id!r} has {env.action_space}"
        )
    fields, policy_kwargs = sb3_arguments(config.algorithm, env.action_space)
    if not learns:
        fields |= {name: n for name, n in NO_ROOM.items() if name in fields}
    model: BaseAlgorithm = algorithm.model(
        algorithm.policy,
        env,
        **fields,
        **_rollout_buffer(algorithm, config),
        # SB3 gives its own NatureCNN no hidden layers, but any other extractor two layers of 64.
        policy_kwargs={
            **algorithm.policy_kwargs,
            **_optimizer(algorithm, config),
            **_features_extractor(config.hub),
            "net_arch": [],
            **policy_kwargs,
        },
        seed=config.train.seed,
        device=config.train.device,
    )
    return model


def scale_learning_rate(model: BaseAlgorithm, scale: float) -> None:
    """
    Multiply the learning rate from now on.

    :param scale: 1: as it is
    """
    schedule = model.lr_schedule
    model.lr_schedule = lambda progress_remaining: scale * schedule(progress_remaining)


def sb3_arguments(
    section: AnySection, actions: spaces.Space[Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    What SB3's algorithm takes of a section of the configuration, and what its policy takes.

    :param actions: the action space, in which action noise lies
    """
    fields = {name: getattr(section, name) for name in type(section).model_fields}
    algorithm = ALGORITHMS[fields.pop("name")]
    policy_kwargs = {name: fields.pop(name) for name in algorithm.policy_fields}
    if "net_arch" in policy_kwargs:
        layers = policy_kwargs["net_arch"]
        policy_kwargs["net_arch"] = {"pi": list(layers.pi), "qf": list(layers.qf)}
    if "action_noise_std" in fields:
        assert actions.shape is not None
        std = np.full(actions.shape, fields.pop("action_noise_std"))
        fields["action_noise"] = NormalActionNoise(np.zeros(actions.shape), std)
    return fields, policy_kwargs


def resolve(config: RunConfig) -> RunConfig:
    """
    The configuration that repeats the run from any folder, as fast as here.

    ``precision: auto`` becomes what this machine's measurement chose, ``top_k: auto`` a number,
    ``always_active: auto`` the names in the hub's card, ``freeze: chosen`` those of the others,
    ``aggregation: auto`` what fits the hub, and a hub's path absolute.

    :raises ValueError: if there is no such device or hub, or ``always_active`` is out of its range
    """
    device = check_device("train.device", config.train.device)
    dtype = resolve_precision(config.hub.precision, device)
    changes = {
        "precision": str(dtype).removeprefix("torch."),
        "name": config.hub.name if config.hub.name == "none" else lasting_name(config.hub.name),
        "top_k": _top_k(config.hub),
        "always_active": _always_active(config.hub),
        "freeze": _freeze(config.hub),
        "aggregation": _aggregation(config.hub),
    }
    return config.model_copy(update={"hub": config.hub.model_copy(update=changes)})


def _top_k(hub: HubSection) -> int:
    if hub.name == "none":  # nothing to choose
        return 2 if hub.top_k == "auto" else hub.top_k
    return number_activated(hub.top_k, _cards(hub))


def _always_active(hub: HubSection) -> tuple[str, ...]:
    if hub.name == "none":
        return ()
    names = "auto" if hub.always_active == ("auto",) else hub.always_active
    cards = _cards(hub)
    top_k = number_activated(hub.top_k, cards)
    return always_active_names(steady_encoders(names, top_k, cards), top_k, cards)


def _freeze(hub: HubSection) -> tuple[str, ...]:
    if hub.name == "none" or hub.freeze != ("chosen",):
        return hub.freeze
    cards = _cards(hub)
    frozen = frozen_names("chosen", _always_active(hub), cards)
    return tuple(name for name in cards.encoder_names if name in frozen)


def _aggregation(hub: HubSection) -> str:
    if hub.name == "none":
        return hub.aggregation
    features_dims = [spec.features_dim for spec in _cards(hub).encoders]
    return aggregation_name(hub.aggregation, features_dims)


def _cards(hub: HubSection) -> HubSpec:
    """Random encoders need no weights on this machine."""
    return load_hub(hub.name, weights=not hub.random_init)


def _optimizer(algorithm: Algorithm, config: RunConfig) -> dict[str, Any]:
    """Adam in one kernel: four times as fast on a hub's weights, and the same up to rounding."""
    scale = config.hub.encoder_lr_scale
    if algorithm.adam is None:
        if scale != 1:
            raise ValueError(
                f"hub.encoder_lr_scale is {scale}, but {config.algorithm.name} learns with "
                "RMSprop, which has one learning rate for all: set it to 1"
            )
        return {}
    kwargs = {**algorithm.adam(config.algorithm), "fused": True}
    if scale == 1:
        return {"optimizer_class": Adam, "optimizer_kwargs": kwargs}
    kwargs["encoder_lr_scale"] = scale
    return {"optimizer_class": EncoderScaledAdam, "optimizer_kwargs": kwargs}


def _rollout_buffer(algorithm: Algorithm, config: RunConfig) -> dict[str, Any]:
    device = get_device(config.train.device)  # the CPU, as SB3 does, where the run's GPU is missing
    is_plain = algorithm.model in (PPO, A2C)  # others keep more, of the masks and of the LSTM
    return (
        {"rollout_buffer_class": DeviceRolloutBuffer} if is_plain and device.type == "cuda" else {}
    )


def _features_extractor(hub: HubSection) -> dict[str, Any]:
    if hub.name == "none":
        return {
            "features_extractor_class": BaselineCNN,
            "features_extractor_kwargs": {"precision": hub.precision},
        }
    return {
        "features_extractor_class": HubFeaturesExtractor,
        "features_extractor_kwargs": {
            "hub": hub.name,
            "top_k": hub.top_k,
            "exploration_coef": hub.exploration_coef.model_dump(),
            "aggregation": hub.aggregation,
            "standardise": hub.standardise,
            "always_active": _always_active(hub),
            "generator": hub.generator,
            "freeze": "all" if hub.freeze == ("all",) else _freeze(hub),
            "freeze_layers": hub.freeze_layers,
            "random_init": hub.random_init,
            "precision": hub.precision,
        },
    }
