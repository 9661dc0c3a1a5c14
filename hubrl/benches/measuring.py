"""Results and their goals, and medians of sides that are measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

#: What a ratio should reach; None: printed beside another.
GOALS: Mapping[str, float | None] = {
    "dispatch.update": 0.42,
    "dispatch.update32": 0.42,
    "dispatch.rollout": 0.55,
    "dispatch.rollout8": 0.65,
    "generator": 0.25,
    "hub_size": 1.05,
    "hub_size.trained": 1.25,
    "hub_size.optimizer": None,
    "ppo.trained": 1.2,
    "ppo.frozen": 4.0,
    "ppo.none": 2.5,
    "ppo.script": None,
    "dqn.trained": 1.0,
    "dqn.frozen": 2.0,
    "dqn.script": None,
    "env": 2.5,
    "env.cpu": None,
    "cache": 0.25,
    "load": 1.1,
    "memory": 1.1,
}

#: A price should be low; anything else is a speed.
PRICES = ("ms", "s", "MB")

#: Measures something once.
Measure = Callable[[], float]


class Result(NamedTuple):
    """One line of the table."""

    name: str
    ratio: float
    """Ours divided by theirs."""
    goal: float | None
    ours: float
    """Median."""
    theirs: float
    """Median."""
    unit: str

    @property
    def is_met(self) -> bool | None:
        """Prices should be low, speeds high; None where there is no goal."""
        if self.goal is None:
            return None
        return self.ratio <= self.goal if self.unit in PRICES else self.ratio >= self.goal


def compare(name: str, ours: float, theirs: float, unit: str) -> Result:
    """The result with the goal of this name."""
    return Result(name, ours / theirs, GOALS[name], ours, theirs, unit)


def interleave(sides: Mapping[str, Measure], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """
    Median of each side, measured in turns so that a slow phase of the machine hits all.

    Every second turn goes backwards: what a side leaves behind hits now this one, now that.

    :param sides: what to measure, by name
    :param rounds: measurements of each
    :param warm_up: measurements of each before them, which don't count
    """
    values: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(warm_up + rounds):
        for name in order:
            values[name].append(sides[name]())
        order.reverse()
    return {name: statistics.median(all_of_it[warm_up:]) for name, all_of_it in values.items()}


def timed(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> Measure:
    """
    What the current GPU still has to do counts.

    :param clock: seconds; ``time.process_time`` counts those of all threads
    """

    def seconds() -> float:
        start = clock()
        run()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return clock() - start

    return seconds
