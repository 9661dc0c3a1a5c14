"""Agents and environments at work, against plain Stable-Baselines3 or with a larger hub."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ale_py
import gymnasium
import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecFrameStack
from torch.optim import Optimizer

from agents.algorithms import ALGORITHMS, build_model, resolve, sb3_arguments
from agents.config import PPOSection, RunConfig, built_in_config, load_config
from agents.faults import watch_gradients
from envs import AtariVecEnv
from hubrl import HubFeaturesExtractor
from hubrl.benches.measuring import Measure, Result, compare, interleave, timed
from hubrl.benches.networks import save_random_hub
from hubrl.games import make_env

gymnasium.register_envs(ale_py)

#: Values of a configuration by key path, such as ``{"hub.freeze": "all"}``.
Overrides = Mapping[str, Any]
AS_SHIPPED: Overrides = {}
VecEnvKind = type[DummyVecEnv] | type[SubprocVecEnv]

GAME = "Breakout"
N_ENVS = 8
LARGE_HUB, SMALL_HUB = 20, 5
TRAINED = {"hub.name": "atari5"}
FROZEN = {"hub.name": "atari5", "hub.freeze": "all"}
PPO_HUBS: Mapping[str, Overrides] = {
    "ppo.trained": TRAINED,
    "ppo.frozen": FROZEN,
    "ppo.none": {"hub.name": "none"},
}
DQN_HUBS: Mapping[str, Overrides] = {"dqn.trained": TRAINED, "dqn.frozen": FROZEN}
#: Of the extractor in a user's script.
SCRIPT_HUB = "atari5"
# Learning starts in the first round, which doesn't count.
DQN_START: Overrides = {"algorithm.learning_starts": 128, "algorithm.buffer_size": 2048}


def measure_hub_size(
    overrides: Overrides = AS_SHIPPED, rounds: int = 4, device: str = "cpu"
) -> list[Result]:
    """A whole PPO iteration, two of 20 encoders against two of five: frozen, and trained."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models: dict[str, BaseAlgorithm] = {}
        for n in (LARGE_HUB, SMALL_HUB):
            hub = {"hub.name": str(save_random_hub(folder / f"hub{n}", n)), **overrides}
            hub |= {"train.device": device}
            models[f"trained{n}"] = stack.enter_context(_our_agent("ppo", hub))
            frozen = {**hub, "hub.freeze": "all"}
            models[f"frozen{n}"] = stack.enter_context(_our_agent("ppo", frozen))
        updates = {name: _watch(model.policy.optimizer) for name, model in models.items()}
        n_steps = _iteration_steps(overrides)
        sides = {name: _learning(model, n_steps) for name, model in models.items()}
        seconds = interleave(sides, rounds, warm_up=1)
    for n in (LARGE_HUB, SMALL_HUB):
        steps = updates[f"trained{n}"]
        seconds[f"optimizer{n}"] = statistics.median(steps) * len(steps) / (rounds + 1)

    def line(name: str, part: str) -> Result:
        large, small = seconds[f"{part}{LARGE_HUB}"], seconds[f"{part}{SMALL_HUB}"]
        return compare(name, 1e3 * large, 1e3 * small, "ms")

    return [
        line("hub_size", "frozen"),
        line("hub_size.trained", "trained"),
        line("hub_size.optimizer", "optimizer"),
    ]


def measure_ppo(
    overrides: Overrides = AS_SHIPPED, rounds: int = 4, device: str = "cpu"
) -> list[Result]:
    """PPO end to end: hub trained, hub frozen, no hub, a script with a hub; against plain SB3."""
    overrides = {**overrides, "train.device": device}
    n_steps = _iteration_steps(overrides)
    return _compare_agents("ppo", PPO_HUBS, "ppo.script", overrides, n_steps, rounds)


def measure_dqn(n_steps: int = 256, rounds: int = 4, device: str = "cpu") -> list[Result]:
    """QR-DQN after learning has started: hub trained, hub frozen, a script with a hub."""
    overrides = {**DQN_START, "train.device": device}
    return _compare_agents("qrdqn", DQN_HUBS, "dqn.script", overrides, n_steps, rounds)


def measure_env(n_steps: int = 256, rounds: int = 5) -> list[Result]:
    """Random play in eight environments, frames stacked on both sides; and its CPU time."""
    actions = np.random.default_rng(0).integers(4, size=(n_steps, N_ENVS))
    with (
        contextlib.closing(AtariVecEnv(f"ALE/{GAME}-v5", N_ENVS)) as ours,
        contextlib.closing(_plain_env(N_ENVS, DummyVecEnv)) as theirs,
    ):
        plays = {"ours": _playing(ours, actions), "theirs": _playing(theirs, actions)}
        wall = interleave({name: timed(play) for name, play in plays.items()}, rounds)
        clock = time.process_time
        cpu = interleave({name: timed(play, clock) for name, play in plays.items()}, rounds, 0)
    speed = {name: actions.size / seconds for name, seconds in wall.items()}
    cost = {name: 1e3 * seconds / n_steps for name, seconds in cpu.items()}
    return [
        compare("env", speed["ours"], speed["theirs"], "steps/s"),
        compare("env.cpu", cost["ours"], cost["theirs"], "ms"),
    ]


def _compare_agents(
    algorithm: str,
    hubs: Mapping[str, Overrides],
    script: str,
    overrides: Overrides,
    n_steps: int,
    rounds: int,
) -> list[Result]:
    """
    Agent steps per second of each hub, against the fastest plain agent; and of the extractor in a
    user's script, against the same script without it.
    """
    config = _config(algorithm, overrides)
    kinds: list[VecEnvKind] = [DummyVecEnv, SubprocVecEnv]
    if config.env.n_envs == 1:
        kinds.remove(SubprocVecEnv)  # nothing runs beside the one
    with contextlib.ExitStack() as stack:
        models: dict[str, BaseAlgorithm] = {}
        for name, hub in hubs.items():
            models[name] = stack.enter_context(_our_agent(algorithm, {**overrides, **hub}))
        for kind in kinds:
            models[kind.__name__] = stack.enter_context(_plain_agent(config, kind))
        models["script"] = stack.enter_context(_plain_agent(config, DummyVecEnv, SCRIPT_HUB))
        sides = {name: _learning(model, n_steps) for name, model in models.items()}
        seconds = interleave(sides, rounds, warm_up=1)
    speed = {name: n_steps / median for name, median in seconds.items()}
    plain = max(speed[kind.__name__] for kind in kinds)
    return [
        *(compare(name, speed[name], plain, "steps/s") for name in hubs),
        compare(script, speed["script"], speed[DummyVecEnv.__name__], "steps/s"),
    ]


@contextlib.contextmanager
def _our_agent(algorithm: str, overrides: Overrides) -> Iterator[BaseAlgorithm]:
    """As ``hubrl train`` builds and watches it, without evaluation, checkpoints and logs."""
    config = resolve(_config(algorithm, overrides))
    with contextlib.closing(make_env(config, config.env.n_envs, training=True)) as env:
        model = build_model(config, env)
        watch_gradients(model)
        yield model


@contextlib.contextmanager
def _plain_agent(
    config: RunConfig, kind: VecEnvKind, hub: str | None = None
) -> Iterator[BaseAlgorithm]:
    """What an SB3 user runs, with the same hyperparameters; with a hub, as README has it."""
    algorithm = ALGORITHMS[config.algorithm.name]
    with contextlib.closing(_plain_env(config.env.n_envs, kind)) as env:
        fields, policy_kwargs = sb3_arguments(config.algorithm, env.action_space)
        if hub is not None:
            policy_kwargs |= {
                "features_extractor_class": HubFeaturesExtractor,
                "features_extractor_kwargs": {"hub": hub, "top_k": 2},
                "net_arch": [],
            }
        device = config.train.device
        # With a seed, as ours: SB3 then asks the GPU's library for deterministic kernels.
        yield algorithm.model(
            "CnnPolicy", env, **fields, policy_kwargs=policy_kwargs, device=device, seed=0
        )


def _plain_env(n_envs: int, kind: VecEnvKind) -> VecEnv:
    env = make_atari_env(f"{GAME}NoFrameskip-v4", n_envs, seed=0, vec_env_cls=kind)
    return VecFrameStack(env, 4)


def _config(algorithm: str, overrides: Overrides) -> RunConfig:
    """The configuration that ships, on the CPU unless something else is said."""
    return load_config(built_in_config(algorithm), {"train.device": "cpu", **overrides})


def _iteration_steps(overrides: Overrides) -> int:
    """Agent steps of an iteration of PPO."""
    config = _config("ppo", overrides)
    assert isinstance(config.algorithm, PPOSection)
    return config.algorithm.n_steps * config.env.n_envs


def _learning(model: BaseAlgorithm, n_steps: int) -> Measure:
    return timed(lambda: model.learn(n_steps, reset_num_timesteps=False))


def _playing(env: VecEnv, actions: np.ndarray) -> Callable[[], None]:
    env.reset()

    def play() -> None:
        for actions_of_envs in actions:
            env.step(actions_of_envs)

    return play


def _watch(optimizer: Optimizer) -> list[float]:
    """Seconds of each of its steps from now on."""
    seconds: list[float] = []

    def now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def stop(*_: Any) -> None:
        seconds[-1] += now()

    optimizer.register_step_pre_hook(lambda *_: seconds.append(-now()))
    optimizer.register_step_post_hook(stop)
    return seconds
