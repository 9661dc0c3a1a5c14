"""The process that a bench starts: our command or a plain script, with a probe in it."""

# At the top is imported only what both sides import anyway, so that neither is charged for it.
from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv
from torch import nn
from torch.optim import Optimizer

STATUS = Path("/proc/self/status")
EXIT_CODES = {"load": 42, "memory": 0}


def main() -> None:
    """``child.py PROBE SIDE ARGUMENTS...``: the arguments are those of the side."""
    probe, side, *arguments = sys.argv[1:]
    sys.argv[1:] = arguments
    with {"load": stop_at_first_step, "memory": tell_memory}[probe]():
        {"hub": run_hub, "plain": run_plain}[side]()


def run_hub() -> None:
    """``python -m hubrl.train ARGUMENTS...``."""
    runpy.run_module("hubrl.train", run_name="__main__")


def run_plain() -> None:
    """What an SB3 user writes; the argument is JSON: ``n_envs``, ``n_timesteps``, ``settings``."""
    import ale_py
    import gymnasium
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    given = json.loads(sys.argv[1])
    gymnasium.register_envs(ale_py)
    env = make_atari_env("BreakoutNoFrameskip-v4", n_envs=given["n_envs"])
    model = PPO("CnnPolicy", VecFrameStack(env, n_stack=4), **given["settings"])
    model.learn(given["n_timesteps"])


@contextlib.contextmanager
def stop_at_first_step() -> Iterator[None]:
    """The process ends where it would step its environments for the first time."""

    def stop(*_: object) -> NoReturn:
        os._exit(EXIT_CODES["load"])

    with mock.patch.object(VecEnv, "step", stop):
        yield


@contextlib.contextmanager
def tell_memory() -> Iterator[None]:
    """The last line is the peak in bytes at the end of ``learn``, without those of weights."""
    learn = PPO.learn

    def learn_and_tell(model: PPO, *args: Any, **kwargs: Any) -> PPO:
        learn(model, *args, **kwargs)
        print(peak_bytes() - weight_bytes(model.policy, model.policy.optimizer), flush=True)
        return model

    with mock.patch.object(PPO, "learn", learn_and_tell):
        yield


def peak_bytes() -> int:
    """Largest resident memory so far."""
    # Not ru_maxrss: on Linux it begins with that of the process that started this one.
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def weight_bytes(module: nn.Module, optimizer: Optimizer) -> int:
    """Of parameters, gradients and the optimizer's state, those on a GPU left out."""
    parameters = list(module.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    tensors = [*parameters, *gradients, *states]
    return sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu")


if __name__ == "__main__":
    main()
