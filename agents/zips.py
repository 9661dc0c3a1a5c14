"""Agents that SB3 saved as a zip, rebuilt from tensors and plain data alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sb3_contrib import QRDQN
from stable_baselines3 import DQN
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.torch_layers import NatureCNN
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from agents.algorithms import ALGORITHMS, NO_ROOM
from hubrl.extractor import HubFeaturesExtractor
from hubrl.files import reason
from hubrl.saved_agents import agent_data, policy_tensors

#: Names of SB3's policies for images, where it is not CnnPolicy.
POLICIES = {"crossq": "MlpPolicy", "recurrent_ppo": "CnnLstmPolicy"}
#: Whose policies a module has. A2C has PPO's, and DDPG TD3's: ``algorithm_of`` tells them apart.
ALGORITHM_OF_MODULE = {
    "stable_baselines3.common.policies": "ppo",
    "sb3_contrib.common.maskable.policies": "maskable_ppo",
    "sb3_contrib.common.recurrent.policies": "recurrent_ppo",
    "stable_baselines3.dqn.policies": "dqn",
    "sb3_contrib.qrdqn.policies": "qrdqn",
    "stable_baselines3.sac.policies": "sac",
    "stable_baselines3.td3.policies": "td3",
    "sb3_contrib.tqc.policies": "tqc",
    "sb3_contrib.crossq.policies": "crossq",
}
#: Arguments of a policy that decide what it does and are plain data, and their types.
PLAIN: Mapping[str, Any] = {
    "net_arch": list | dict | None,
    "share_features_extractor": bool,
    "normalize_images": bool,
    "n_quantiles": int,
    "n_critics": int,
    "lstm_hidden_size": int,
}
#: Other ones that are known: the rest would change what the agent does without a word.
OTHER = {
    ":type:", ":serialized:", "activation_fn", "features_extractor_class",
    "features_extractor_kwargs", "optimizer_class", "optimizer_kwargs", "ortho_init",
    "log_std_init", "use_sde",
}  # fmt: skip
#: By what SB3 writes of them.
ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    str(cls): cls
    for cls in (nn.Tanh, nn.ReLU, nn.ELU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Mish, nn.Sigmoid)
}
#: Arguments of SB3's NatureCNN.
NATURE: Mapping[str, Any] = {"features_dim": int, "normalized_image": bool}
#: Arguments of HubFeaturesExtractor.
EXTRACTOR: Mapping[str, Any] = {
    "hub": str,
    "top_k": int | str,
    "exploration_coef": int | float | dict,
    "features_dim": int,
    "aggregation": str,
    "standardise": bool,
    "always_active": str | list,
    "generator": str,
    "freeze": str | list,
    "freeze_layers": int,
    "random_init": bool,
    "precision": str,
}
#: Arguments that may be whole numbers, but are no sizes.
NUMBERS = ("exploration_coef", "freeze_layers")
#: Of a stranger's layers, which are built before its tensors are read.
MAX_WIDTH, MAX_LAYERS = 8192, 8


def hub_of(file: Path) -> str:
    """
    The hub of a saved agent, or ``none`` for SB3's own NatureCNN.

    :raises ValueError: if it is no agent that SB3 saved, or has another features extractor
    """
    return str(_extractor_kwargs(file).get("hub", "atari5")) if _has_hub(file) else "none"


def algorithm_of(file: Path) -> str:
    """
    What a saved agent was trained with: a key of ``agents.algorithms.ALGORITHMS``.

    :raises ValueError: if it is no agent that SB3 saved, or has a policy of another's
    """
    data = agent_data(file)
    policy = data.get("policy_class")
    module = policy.get("__module__") if isinstance(policy, dict) else None
    name = ALGORITHM_OF_MODULE.get(str(module))
    if name is None or "cg_max_steps" in data:  # TRPO has PPO's policies, too
        raise ValueError(
            f"{file} is of an algorithm or a policy that isn't known: say what it plays like by "
            f"--algo ({', '.join(ALGORITHMS)})"
        )
    if name == "ppo" and "clip_range" not in data:
        return "a2c"
    if name == "td3" and _policy_kwargs(file).get("n_critics") == 1:
        return "ddpg"
    return name


def rebuild(file: Path, algorithm: str, env: VecEnv) -> BaseAlgorithm:
    """
    The agent in a zip, built anew with its weights; SB3's own loader would run what is pickled.

    For playing: hyperparameters, optimizer and replay buffer stay behind.

    :param file: what ``model.save`` wrote
    :param algorithm: a key of ``agents.algorithms.ALGORITHMS``
    :param env: with the spaces that the agent was trained with
    :raises ValueError: if the file, the algorithm and the environment don't fit each other
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algo is {algorithm!r}, allowed: {', '.join(ALGORITHMS)}")
    _check_images(file, env)
    given = _policy_kwargs(file)
    kwargs = _plain({name: given[name] for name in given if name not in OTHER}, PLAIN, file)
    if "activation_fn" in given:
        kwargs["activation_fn"] = _activation(given["activation_fn"], file)
    if "features_extractor_class" in given:  # CrossQ's own is another
        kwargs["features_extractor_class"] = HubFeaturesExtractor if _has_hub(file) else NatureCNN
    kwargs["features_extractor_kwargs"] = _extractor_kwargs(file)
    agent = ALGORITHMS[algorithm].model
    taken = inspect.signature(agent).parameters
    names = ("buffer_size",) if "buffer_size" in taken else NO_ROOM  # DQN's n_steps is no rollout's
    settings: dict[str, Any] = {name: NO_ROOM[name] for name in names if name in taken}
    try:
        policy = POLICIES.get(algorithm, "CnnPolicy")
        model: BaseAlgorithm = agent(policy, env, policy_kwargs=kwargs, **settings)
        model.policy.load_state_dict(policy_tensors(file))
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"{file} does not fit algo {algorithm!r} and this env: {reason(error)}"
        ) from None
    rate = agent_data(file).get("exploration_rate")
    if isinstance(model, DQN | QRDQN) and isinstance(rate, float) and 0 <= rate <= 1:
        model.exploration_rate = rate  # by which its actions are sampled
    return model


def _check_images(file: Path, env: VecEnv) -> None:
    space = agent_data(file).get("observation_space")
    shape = space.get("_shape") if isinstance(space, dict) else None
    if isinstance(shape, list) and shape != list(env.observation_space.shape or ()):
        raise ValueError(
            f"{file} is an agent that observes {str(tuple(shape))[:100]}, but hubrl train would "
            f"give it {env.observation_space.shape}: evaluate it in a script, in the environments "
            "that it was trained in"
        )


def _has_hub(file: Path) -> bool:
    name = _policy_kwargs(file).get("features_extractor_class", str(NatureCNN))
    if name not in (str(HubFeaturesExtractor), str(NatureCNN)):
        raise ValueError(
            f"{file} has the features extractor {name}, allowed: HubFeaturesExtractor, NatureCNN"
        )
    return bool(name == str(HubFeaturesExtractor))


def _extractor_kwargs(file: Path) -> dict[str, Any]:
    kwargs = _policy_kwargs(file).get("features_extractor_kwargs", {})
    if not isinstance(kwargs, dict):
        raise ValueError(f"{file}: features_extractor_kwargs must be plain data: names and numbers")
    return _plain(kwargs, EXTRACTOR if _has_hub(file) else NATURE, file)


def _activation(text: Any, file: Path) -> type[nn.Module]:
    if not isinstance(text, str) or text not in ACTIVATIONS:
        names = ", ".join(cls.__name__ for cls in ACTIVATIONS.values())
        raise ValueError(f"{file}: activation_fn is {text!r}, allowed of torch.nn: {names}")
    return ACTIVATIONS[text]


def _plain(kwargs: dict[str, Any], types: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The arguments, if they have these types, and layers have a size that fits in memory."""
    for name, value in kwargs.items():
        if name not in types:
            raise ValueError(f"{file} has the argument {name!r}, allowed: {', '.join(types)}")
        if not isinstance(value, types[name]) or (type(value) is bool and types[name] is not bool):
            kind = getattr(types[name], "__name__", types[name])
            raise ValueError(f"{file}: {name} is {value!r}, allowed: {kind}")
        if name == "net_arch":
            layers = value.values() if isinstance(value, dict) else [value or []]
            fits = all(map(_are_layers, layers))
        else:
            fits = type(value) is not int or _is_width(value) or name in NUMBERS
        if not fits:
            raise ValueError(
                f"{file}: {name} is {value!r}, allowed: 1 to {MAX_WIDTH}, of at most {MAX_LAYERS} "
                "layers"
            )
    return kwargs


def _are_layers(layers: Any) -> bool:
    return isinstance(layers, list) and len(layers) <= MAX_LAYERS and all(map(_is_width, layers))


def _is_width(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_WIDTH


def _policy_kwargs(file: Path) -> Mapping[str, Any]:
    """What SB3 wrote of them beside their pickle."""
    kwargs = agent_data(file).get("policy_kwargs")
    return kwargs if isinstance(kwargs, dict) else {}
