"""``hubrl train``: trains an agent, with a hub or without, and keeps the run in a folder."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from hubrl import cli
from hubrl.callback import PathwayCallback
from hubrl.run_folder import check_new_run, note_command, read_rows
from hubrl.signals import StopSignal
from hubrl.specs import load_hub
from hubrl.state_folder import NotSavedError, has_state, read_state

cli.refuse_foreign_modules("agents", "envs")

from agents.algorithms import build_model, resolve  # noqa: E402
from agents.callbacks import (  # noqa: E402
    CheckpointCallback,
    EncodersCallback,
    EpisodesCallback,
    EvaluationCallback,
    ProgressCallback,
)
from agents.checkpoints import continue_run  # noqa: E402
from agents.config import (  # noqa: E402
    MaskablePPOSection,
    RunConfig,
    algorithm_names,
    built_in_config,
    load_config,
)
from agents.runs import (  # noqa: E402
    EVALUATIONS_FILE,
    checkpoint_dir,
    create_run,
    default_run_dir,
    make_logger,
    open_run,
)
from envs import ImageFormat, make_vec_env, with_action_masks  # noqa: E402

#: The keys of the configuration that options override.
KEYS = {
    "env": "env.id",
    "n_envs": "env.n_envs",
    "sticky": "env.sticky",
    "hub": "hub.name",
    "top_k": "hub.top_k",
    "always_active": "hub.always_active",
    "exploration_coef": "hub.exploration_coef",
    "aggregation": "hub.aggregation",
    "freeze": "hub.freeze",
    "random_init": "hub.random_init",
    "n_timesteps": "train.n_timesteps",
    "seed": "train.seed",
    "eval_freq": "train.eval_freq",
    "save_freq": "train.save_freq",
    "device": "train.device",
}
HUB_OPTIONS = (
    "top_k",
    "always_active",
    "exploration_coef",
    "aggregation",
    "freeze",
    "random_init",
)
FILE = click.Path(path_type=Path)
EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("train")
@click.option("--algo", help=f"{', '.join(algorithm_names())}.  [default: ppo]")
@click.option("--env", help="Gymnasium id.  [default: as in the algorithm's configuration]")
@click.option("--hub", help="none, HUB, HUB:ENCODER, FOLDER or FILE.yaml.  [default: atari5]")
@click.option("--top-k", help="Encoders that run for an observation.  [default: 2]")
@click.option("-n", "--n-timesteps", help="Agent steps of the whole run.  [default: 1000000]")
@click.option("--seed", help="Everything random follows from it.  [default: 0]")
@click.option("--n-envs", help="Environments side by side.  [default: the algorithm's]")
@click.option("--sticky", help="Probability that Atari repeats the last action.  [default: 0]")
@click.option("--exploration-coef", help="Weight of the pathway exploration loss.")
@click.option(
    "--always-active",
    multiple=True,
    help="An encoder that runs for each observation, or none.  [default: as the hub's card says]",
)
@click.option("--aggregation", help="auto, concat or sum.  [default: auto]")
@click.option("--freeze", multiple=True, help="An encoder that stays as it is, or all.")
@click.option("--random-init", is_flag=True, default=None, help="No pretrained weights.")
@click.option("--eval-freq", help="Agent steps between evaluations; 0: none.")
@click.option("--save-freq", help="Agent steps between checkpoints; 0: only at the end.")
@click.option("--device", help="auto, cpu, cuda ...  [default: auto]")
@click.option("--config", type=EXISTING, help="Complete YAML configuration.")
@click.option("--run-dir", type=FILE, help="A new folder.  [default: runs/...]")
@click.option("--resume", type=FILE, metavar="RUN", help="Continue the run in this folder.")
def command(**options: Any) -> int:
    """
    Train an agent; options win over the configuration file.

    Without --config the settings are those of configs/agents/ALGO-*.yaml.
    """
    # Dispatch gives encoders batches of every size, and oneDNN keeps a kernel for each size that it
    # has seen: 1024 of them take more memory than the networks.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "resume" in given:
        return _resume(given)
    return _start(given)


def _start(given: dict[str, Any]) -> int:
    with cli.user_errors():
        config = resolve(_configure(given))
        folder = given.get("run_dir") or default_run_dir(config)
        check_new_run(folder)
        model = build_model(config, make_env(config, config.env.n_envs, training=True))
        create_run(folder, config)
    return _learn(model, config, folder)


def _resume(given: dict[str, Any]) -> int:
    folder = given.pop("resume")
    with cli.user_errors():
        if given:
            option = next(iter(given)).replace("_", "-")
            raise ValueError(f"--{option} and --resume: a resumed run keeps its config.yaml")
        config = open_run(folder)
        checkpoint = checkpoint_dir(folder, "last")
        is_begun = has_state(checkpoint)  # else it ended before its first checkpoint
        timesteps = read_state(checkpoint)["num_timesteps"] if is_begun else 0
        if timesteps >= config.train.n_timesteps and _is_evaluated(folder, config, timesteps):
            print(f"{folder} is complete: {timesteps:,} steps")
            return 0
        model = build_model(config, make_env(config, config.env.n_envs, training=True))
        if is_begun:
            continue_run(model, checkpoint)
    model._update_current_progress_remaining(timesteps, config.train.n_timesteps)
    return _learn(model, config, folder)


def _is_evaluated(folder: Path, config: RunConfig, timesteps: int) -> bool:
    """A signal may have cut the last evaluation short."""
    steps = [int(row["timesteps"]) for row in read_rows(folder / EVALUATIONS_FILE)]
    return config.train.eval_freq == 0 or max(steps, default=0) >= timesteps


def _configure(given: dict[str, Any]) -> RunConfig:
    """The file's configuration with the options that were given."""
    hub = given.get("hub", "")
    for option in HUB_OPTIONS:
        if hub == "none" and option in given:
            raise ValueError(f"--{option.replace('_', '-')} has no meaning with --hub none")
    file = given.get("config") or built_in_config(given.get("algo", "ppo"))
    overrides = {KEYS[name]: value for name, value in given.items() if name in KEYS}
    if hub:  # the file's names are of another hub
        overrides.setdefault("hub.always_active", "auto")
    if given.get("always_active") == ("none",):
        overrides["hub.always_active"] = []
    if hub and hub != "none" and "top_k" not in given and len(load_hub(hub).encoders) == 1:
        overrides["hub.top_k"] = 1
    config = load_config(file, overrides)
    if given.get("algo", config.algorithm.name) != config.algorithm.name:
        raise ValueError(f"--algo {given['algo']}, but {file} is for {config.algorithm.name}")
    return config


def make_env(config: RunConfig, n_envs: int, *, training: bool = False) -> VecEnv:
    """
    The environments of a run, giving the images that its hub asks for.

    :param training: clipped rewards and a lost life as an end, in Atari
    """
    vec_env = make_vec_env(
        config.env.id,
        n_envs,
        seed=config.train.seed,
        sticky=config.env.sticky,
        training=training,
        image=image_format(config.hub.name),
    )
    return (
        with_action_masks(vec_env) if isinstance(config.algorithm, MaskablePPOSection) else vec_env
    )


def image_format(hub: str) -> ImageFormat:
    """Colour where all encoders want it, else a stack of grey images; as large as the largest."""
    if hub == "none":
        return ImageFormat()
    encoders = load_hub(hub).encoders
    size = max(max(spec.image_size) for spec in encoders)
    min_size = -(-size // 2)  # as check_image_shape
    n_frames = max(spec.n_frames for spec in encoders)
    stacks = [spec.channels for spec in encoders if spec.channels != 3]
    if stacks:
        stack = max(n_frames, *stacks)
        return ImageFormat(size=size, grey=True, stack=stack, min_size=min_size)
    return ImageFormat(size=size, grey=False, stack=n_frames, min_size=min_size)


def _learn(model: BaseAlgorithm, config: RunConfig, folder: Path) -> int:
    """Train to the end or to a signal; returns the exit code."""
    note_command(folder)
    print(f"run folder: {folder}", flush=True)
    train, stop = config.train, StopSignal()
    n_eval_envs = min(config.env.n_envs, train.n_eval_episodes)
    logger = make_logger(folder, model.num_timesteps)
    model.set_logger(logger)
    callbacks: list[BaseCallback] = [
        EpisodesCallback(folder),
        CheckpointCallback(folder, train, stop),
        EvaluationCallback(folder, partial(make_env, config, n_eval_envs), train, stop),
        ProgressCallback(),
    ]
    if config.hub.name != "none":
        callbacks.insert(0, PathwayCallback())
        callbacks.append(EncodersCallback())
    with stop.caught(), cli.failures(NotSavedError):
        model.learn(
            train.n_timesteps - model.num_timesteps,
            callback=callbacks,
            log_interval=None,  # type: ignore[arg-type]
            reset_num_timesteps=False,
            progress_bar=sys.stdout.isatty(),
        )
    logger.close()
    return 0 if stop.number is None else 128 + stop.number


if __name__ == "__main__":
    cli.run(command, "python -m hubrl.train")
