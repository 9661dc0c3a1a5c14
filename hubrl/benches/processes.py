"""Whole processes, our command and a plain script: time to the first step, peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from agents.config import built_in_config, load_config
from hubrl.benches import child
from hubrl.benches.measuring import Result, compare, interleave, timed
from hubrl.origin import same_code

N_STEPS = 2048  # two iterations: the first holds all that the run will hold
COMMAND = ("--env", "ALE/Breakout-v5", "--hub", "atari5")
MB = 1e6


def measure_load(rounds: int = 3, device: str = "cpu") -> list[Result]:
    """Seconds from the start of a process to its first environment step."""
    sides = {
        "ours": timed(lambda: _run("load", "hub", *COMMAND, "--device", device)),
        "theirs": timed(lambda: _run("load", "plain", _plain(device=device))),
    }
    seconds = interleave(sides, rounds, warm_up=1)
    return [compare("load", seconds["ours"], seconds["theirs"], "s")]


def measure_memory(n_steps: int = N_STEPS, rounds: int = 2, device: str = "cpu") -> list[Result]:
    """Peak resident memory of a PPO run, without the bytes of its weights; Linux alone tells."""
    if not child.STATUS.exists():
        return []
    ours = ("-n", str(n_steps), "--eval-freq", "0", "--save-freq", "0", "--device", device)
    theirs = _plain(n_timesteps=n_steps, device=device)
    sides = {
        "ours": lambda: float(_run("memory", "hub", *COMMAND, *ours)) / MB,
        "theirs": lambda: float(_run("memory", "plain", theirs)) / MB,
    }
    megabytes = interleave(sides, rounds, warm_up=0)
    return [compare("memory", megabytes["ours"], megabytes["theirs"], "MB")]


def _plain(n_timesteps: int = 1_000_000, device: str = "cpu") -> str:
    """The plain script's argument, with the sizes of our configuration."""
    config = load_config(built_in_config("ppo"))
    sizes = config.algorithm.model_dump(include={"n_steps", "batch_size", "n_epochs"})
    settings = {**sizes, "device": device}
    given = {"n_envs": config.env.n_envs, "n_timesteps": n_timesteps, "settings": settings}
    return json.dumps(given)


def _run(probe: str, side: str, *arguments: str) -> str:
    """
    Run ``child`` in an empty folder; returns its last line.

    :raises RuntimeError: if it ended otherwise than its probe does
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-P", child.__file__, probe, side, *arguments],
            cwd=folder,
            env={**os.environ, **same_code()},
            capture_output=True,
            text=True,
        )
    if done.returncode != child.EXIT_CODES[probe]:
        raise RuntimeError(f"{probe} {side} exits {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout.rpartition("\n")[0].rpartition("\n")[2]
