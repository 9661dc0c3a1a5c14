"""``hubrl bench``: speed against what a user would run instead, both sides in one process."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ale_py
import click
import gymnasium
import torch
from rich.console import Console
from rich.table import Table
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack
from torch import Tensor

from hubrl import cli
from hubrl.pathway import HubPathway
from hubrl.precision import fast_dtype
from hubrl.specs import EncoderSpec, HubSpec

cli.refuse_foreign_modules("agents", "envs")

from agents.algorithms import build_model, resolve  # noqa: E402
from agents.config import built_in_config, load_config  # noqa: E402
from envs import make_vec_env  # noqa: E402

gymnasium.register_envs(ale_py)

GAME = "Breakout"
N_ENVS = 8
PPO_ROUNDS = 5
ROLLOUT = 1024  # agent steps of one PPO iteration, on both sides

Timed = Callable[[], Any]


class Result(NamedTuple):
    """One line of the table."""

    name: str
    ratio: float
    """Ours divided by theirs."""
    goal: float
    ours: float
    """Median."""
    theirs: float
    """Median."""
    unit: str

    @property
    def is_met(self) -> bool:
        """Times should be low, speeds high."""
        return self.ratio <= self.goal if self.unit == "ms" else self.ratio >= self.goal


class Bench(NamedTuple):
    """A measurement: which results it gives, and how."""

    names: tuple[str, ...]
    measure: Callable[[], list[Result]]


@click.command("bench")
@click.argument("name", default="all")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write the results here.")
def command(name: str, file: Path | None) -> None:
    """
    Measure NAME (a bench, the part of its name before the dot, or all).

    Ratios are ours / theirs of medians, measured in turns. Nothing else should run meanwhile.
    """
    with cli.user_errors():
        chosen = _choose(name)
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"--json {file}: there is no folder {file.absolute().parent}")
    results = []
    for bench in chosen:
        results += [result for result in bench.measure() if _matches(result.name, name)]
    if file is not None:
        rows = [result._asdict() | {"machine": machine()} for result in results]
        file.write_text(json.dumps(rows, indent=1) + "\n")
    _print(results)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = [
        line.split(":")[1].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    return {
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "precision": str(fast_dtype("cpu")).removeprefix("torch."),
        "load_average": round(os.getloadavg()[0], 2),
    }


def interleave(sides: dict[str, Timed], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """
    Median seconds of each side, measured in turns so that a slow phase of the machine hits all.

    :param sides: what to time, by name
    :param rounds: measurements of each
    :param warm_up: unmeasured calls of each before them
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(warm_up + rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure_dispatch() -> list[Result]:
    """Two of five NatureCNN routed, generator included, against all five; 32: in float32."""
    return [
        _dispatch("dispatch.update", goal=0.46, batch=256, backward=True),
        _dispatch("dispatch.update32", goal=0.46, batch=256, backward=True, precision="float32"),
        _dispatch("dispatch.rollout", goal=0.55, batch=16, backward=False),
        _dispatch("dispatch.rollout8", goal=0.65, batch=8, backward=False),
    ]


def measure_ppo() -> list[Result]:
    """PPO end to end: with the hub, and without it, against plain SB3."""
    with contextlib.ExitStack() as stack:
        ours = {"ppo.trained": _our_ppo("atari5"), "ppo.none": _our_ppo("none")}
        theirs = {kind.__name__: _plain_ppo(kind) for kind in (DummyVecEnv, SubprocVecEnv)}
        for model in [*ours.values(), *theirs.values()]:
            assert model.env is not None
            stack.callback(model.env.close)
        sides = {name: _iteration(model) for name, model in {**ours, **theirs}.items()}
        seconds = interleave(sides, rounds=PPO_ROUNDS, warm_up=1)
    speed = {name: ROLLOUT / value for name, value in seconds.items()}
    plain = max(speed[name] for name in theirs)
    goals = {"ppo.trained": 0.8, "ppo.none": 1.5}
    return [
        Result(name, speed[name] / plain, goals[name], speed[name], plain, "steps/s")
        for name in ours
    ]


#: In the order of the table.
BENCHES = (
    Bench(
        ("dispatch.update", "dispatch.update32", "dispatch.rollout", "dispatch.rollout8"),
        measure_dispatch,
    ),
    Bench(("ppo.trained", "ppo.none"), measure_ppo),
)


def _choose(name: str) -> list[Bench]:
    chosen = [bench for bench in BENCHES if any(_matches(result, name) for result in bench.names)]
    if not chosen:
        names = [result for bench in BENCHES for result in bench.names]
        raise ValueError(f"bench {name!r} is unknown, allowed: all, {', '.join(names)}")
    return chosen


def _matches(result: str, name: str) -> bool:
    return name in ("all", result, result.split(".")[0])


def _random_hub() -> HubSpec:
    """Five NatureCNN without weights: speed doesn't depend on what they know."""
    encoders = tuple(
        EncoderSpec(
            name=f"encoder{i}",
            architecture="nature_conv",
            features_dim=3136,
            image_size=(84, 84),
            channels=4,
            license="MIT",
            source="random numbers",
        )
        for i in range(5)
    )
    return HubSpec(name="random5", encoders=encoders)


def _dispatch(
    name: str, goal: float, batch: int, backward: bool, precision: str = "auto"
) -> Result:
    torch.manual_seed(0)
    routed = HubPathway(_random_hub(), top_k=2, precision=precision)
    dense = HubPathway(_random_hub(), top_k=5, precision=precision)
    images = torch.randint(0, 256, (batch, 4, 84, 84), dtype=torch.uint8)

    # What a user would run instead has no generator: all encoders with equal weights.
    everyone = torch.arange(5).expand(batch, 5)
    equal = torch.full((batch, 5), 0.2)

    def run(features: Callable[[], Tensor]) -> None:
        with torch.set_grad_enabled(backward):
            result = features()
        if backward:
            result.sum().backward()  # type: ignore[no-untyped-call]

    sides: dict[str, Timed] = {
        "ours": lambda: run(lambda: routed.route(images, torch.randn(batch, 5)).features),
        "theirs": lambda: run(lambda: dense.aggregate(images, equal, everyone)),
    }
    seconds = interleave(sides, rounds=15 if backward else 101)
    ours, theirs = 1e3 * seconds["ours"], 1e3 * seconds["theirs"]
    return Result(name, ours / theirs, goal, ours, theirs, "ms")


def _our_ppo(hub: str) -> BaseAlgorithm:
    config = resolve(load_config(built_in_config("ppo"), {"hub.name": hub}))
    env = make_vec_env(f"ALE/{GAME}-v5", N_ENVS, seed=0, sticky=0.0, training=True)
    return build_model(config, env)


def _plain_ppo(vec_env: type[DummyVecEnv] | type[SubprocVecEnv]) -> BaseAlgorithm:
    """What an SB3 user runs, with the same hyperparameters."""
    section = load_config(built_in_config("ppo")).algorithm
    settings = {name: getattr(section, name) for name in type(section).model_fields}
    del settings["name"]
    env = make_atari_env(f"{GAME}NoFrameskip-v4", N_ENVS, seed=0, vec_env_cls=vec_env)
    return PPO("CnnPolicy", VecFrameStack(env, 4), **settings, device="cpu")


def _iteration(model: BaseAlgorithm) -> Timed:
    return lambda: model.learn(ROLLOUT, reset_num_timesteps=False)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _print(results: list[Result]) -> None:
    table = Table("bench", "ratio", "goal", "ours", "theirs", "unit", "")
    for result in results:
        numbers = [f"{value:.3g}" for value in (result.ratio, result.goal)]
        medians = [f"{value:.4g}" for value in (result.ours, result.theirs)]
        mark = "met" if result.is_met else "MISSED"
        table.add_row(result.name, *numbers, *medians, result.unit, mark)
    Console().print(table)


if __name__ == "__main__":
    cli.run(command, "python -m hubrl.bench")
