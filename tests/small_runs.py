"""Small runs for the tests of training: every algorithm on a tiny image environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import yaml
from stable_baselines3.common.vec_env import VecEnv

from agents.config import RunConfig, built_in_config, dump_config, load_config
from envs import ImageFormat, make_vec_env
from hubrl.files import file_sha256

SMALL: dict[str, Any] = {
    "env.id": "hubrl/TinyImage-v0",
    "env.n_envs": 2,
    "hub.name": "none",
    "hub.precision": "float32",
    "train.n_timesteps": 100,
    "train.eval_freq": 0,
    "train.save_freq": 0,
    "train.n_eval_episodes": 2,
    "train.device": "cpu",
}
SMALL_ON_POLICY = {"algorithm.n_steps": 16}
SMALL_PPO = SMALL_ON_POLICY | {"algorithm.batch_size": 16, "algorithm.n_epochs": 1}
SMALL_OFF_POLICY = {
    "algorithm.buffer_size": 200,
    "algorithm.learning_starts": 20,
    "algorithm.batch_size": 8,
    "algorithm.target_update_interval": 10,
}
SMALL_CONTINUOUS = {
    "env.id": "hubrl/TinyImageContinuous-v0",
    "algorithm.buffer_size": 200,
    "algorithm.learning_starts": 80,
    "algorithm.batch_size": 8,
    "algorithm.train_freq": 4,
    "algorithm.net_arch": {"pi": [8], "qf": [8]},
}
SMALL_OF: dict[str, dict[str, Any]] = {
    "ppo": SMALL_PPO,
    "a2c": SMALL_ON_POLICY,
    "dqn": SMALL_OFF_POLICY,
    "qrdqn": SMALL_OFF_POLICY,
    "sac": SMALL_CONTINUOUS,
    "td3": SMALL_CONTINUOUS,
    "ddpg": SMALL_CONTINUOUS,
    "tqc": SMALL_CONTINUOUS,
    "crossq": SMALL_CONTINUOUS,
    "maskable_ppo": SMALL_PPO,
    "recurrent_ppo": SMALL_PPO | {"algorithm.lstm_hidden_size": 8},
}


def small_config(algorithm: str = "ppo", overrides: dict[str, Any] | None = None) -> RunConfig:
    """A run of 100 steps on TinyImage."""
    values = SMALL | SMALL_OF[algorithm] | (overrides or {})
    return load_config(built_in_config(algorithm), values)


def write_small_config(file: Path, algorithm: str = "ppo", **overrides: Any) -> Path:
    """The same as a YAML file; ``train__seed=3`` overrides ``train.seed``."""
    values = {key.replace("__", "."): value for key, value in overrides.items()}
    file.write_text(dump_config(small_config(algorithm, values)))
    return file


def small_env(n_envs: int = 2, algorithm: str = "ppo", *, size: int = 36, **options: Any) -> VecEnv:
    """TinyImage with observations of (4, 36, 36), and with actions that the algorithm takes."""
    env_id = (SMALL | SMALL_OF[algorithm])["env.id"]
    return make_vec_env(env_id, n_envs, image=ImageFormat(size=size), **options)


def renew_manifest(folder: Path) -> None:
    """Of a checkpoint whose files a test has changed, as a stranger would have it."""
    file = folder / "manifest.json"
    names = sorted(path.name for path in folder.iterdir() if path != file)
    file.write_text(json.dumps({name: file_sha256(folder / name) for name in names}))


def register_env(env_id: str, kind: type[gym.Env[Any, Any]]) -> None:
    """Whatever had the id in a test before."""
    gym.registry.pop(env_id, None)
    gym.register(env_id, kind)


def small_study(folder: Path, **changes: Any) -> Path:
    """A study file of two variants on TinyImage with its base configuration beside it."""
    write_small_config(folder / "base.yaml")
    study = {
        "config": "base.yaml",
        "n_timesteps": 64,
        "games": ["hubrl/TinyImage-v0"],
        "seeds": [0],
        "control": "none",
        "overrides": {},
        "variants": {"none": {}, "fast": {"overrides": {"algorithm.learning_rate": 0.001}}},
        "metric": {
            "n_points": 4,
            "window": 0.5,
            "jump_start": 0.5,
            "thresholds": [0.5, 1.0],
            "floors": {},
        },
    }
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(study | changes, sort_keys=False))
    return file


def write_complete_run(
    folder: Path, config: RunConfig, games: list[tuple[int, float, float]]
) -> None:
    """
    What a study reads of a complete run.

    :param games: steps, return, seconds of each
    """
    last = folder / "checkpoints" / "last"
    last.mkdir(parents=True)
    (last / "state.json").write_text(json.dumps({"num_timesteps": config.train.n_timesteps}))
    renew_manifest(last)
    (folder / "config.yaml").write_text(dump_config(config))
    lines = [f"{steps},{score},8,{seconds}" for steps, score, seconds in games]
    (folder / "episodes.csv").write_text("\n".join(["timesteps,return,length,seconds", *lines, ""]))
