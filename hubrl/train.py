"""``hubrl train``: trains an agent, with a hub or without, and keeps the run in a folder."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from hubrl import cli
from hubrl.callback import PathwayCallback
from hubrl.files import DamagedFileError
from hubrl.finite import ROLLBACK_SCALE, NotFiniteError, advice
from hubrl.run_folder import (
    cell_number,
    check_new_run,
    note_command,
    read_rows,
    replace_config,
)
from hubrl.sections import given_settings
from hubrl.signals import StopSignal
from hubrl.specs import load_hub
from hubrl.state_folder import NotSavedError, has_state, read_state, repair_state

cli.refuse_foreign_modules("agents", "envs")

from agents.algorithms import build_model, resolve, scale_learning_rate  # noqa: E402
from agents.callbacks import (  # noqa: E402
    CheckpointCallback,
    EncodersCallback,
    EpisodesCallback,
    EvaluationCallback,
    ProgressCallback,
)
from agents.checkpoints import Progress, continue_run  # noqa: E402
from agents.config import (  # noqa: E402
    RunConfig,
    algorithm_names,
    built_in_config,
    dump_config,
    load_config,
    parse_config,
)
from agents.faults import (  # noqa: E402
    OutOfMemoryError,
    check_memory,
    memory_errors,
    policy_errors,
    watch_gradients,
)
from agents.runs import (  # noqa: E402
    EVALUATIONS_FILE,
    checkpoint_dir,
    create_run,
    default_run_dir,
    make_logger,
    open_run,
)
from envs import (  # noqa: E402
    EnvironmentFaultError,
    env_state,
    restore_env,
)
from hubrl.games import make_env  # noqa: E402

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
    "freeze_layers": "hub.freeze_layers",
    "random_init": "hub.random_init",
    "n_timesteps": "train.n_timesteps",
    "seed": "train.seed",
    "eval_freq": "train.eval_freq",
    "save_freq": "train.save_freq",
    "device": "train.device",
}
#: The place of a fault's record in a run folder.
FAULT_FILE = "environment-fault.json"
#: Of glibc's ``mallopt``: how many heaps there may be.
M_ARENA_MAX = -8
FILE = click.Path(path_type=Path)
EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("train")
@click.option("--algo", help=f"{', '.join(algorithm_names())}.  [default: ppo]")
@click.option(
    "--env", help="Gymnasium id.  [default: ALE/Breakout-v5; CarRacing-v3 for continuous actions]"
)
@click.option("--hub", help="none, HUB, HUB:ENCODER, FOLDER or FILE.yaml.  [default: atari5]")
@click.option(
    "--top-k", help="Encoders that run for an observation.  [default: 2; 1 of a single encoder]"
)
@click.option(
    "-n",
    "--n-timesteps",
    help="Agent steps of the whole run; beside --resume RUN, its new number.  [default: 1000000]",
)
@click.option("--seed", help="Everything random follows from it.  [default: 0]")
@click.option("--n-envs", help="Environments side by side.  [default: the algorithm's]")
@click.option("--sticky", help="Probability that Atari repeats the last action.  [default: 0]")
@click.option("--exploration-coef", help="Weight of the pathway exploration loss.  [default: 0.01]")
@click.option(
    "--always-active",
    multiple=True,
    help="An encoder that runs for each observation, or none; may be repeated.  "
    "[default: as the hub's card says, or the first]",
)
@click.option("--aggregation", help="auto, concat or sum.  [default: auto]")
@click.option(
    "--freeze",
    multiple=True,
    help="An encoder that stays as it is; all; or chosen: all that aren't always active. "
    "May be repeated.",
)
@click.option("--freeze-layers", help="First layers of each encoder that stay as they are.")
@click.option("--random-init", is_flag=True, default=None, help="No pretrained weights.")
@click.option(
    "--eval-freq", help="Agent steps between evaluations; 0: none.  [default: the algorithm's]"
)
@click.option(
    "--save-freq", help="Agent steps between checkpoints; 0: only at the end.  [default: 100000]"
)
@click.option("--device", help="auto, cpu, cuda ...  [default: auto]")
@click.option("--config", type=EXISTING, help="Complete YAML configuration.")
@click.option("--set", "set", multiple=True, metavar="SECTION.KEY=VALUE", help=cli.SET_HELP)
@click.option("--run-dir", type=FILE, help="A new folder.  [default: runs/...]")
@click.option("--resume", type=FILE, metavar="RUN", help=cli.RESUME_HELP)
def command(**options: Any) -> int:
    """
    Train an agent; options win over the configuration file.

    Without --config the settings are those of configs/agents/ALGO-*.yaml.
    """
    limit_memory()
    given = {name: value for name, value in options.items() if value not in (None, ())}
    resume = given.pop("resume", None)
    if resume not in (None, cli.AUTO):
        return _resume(resume, given)
    with cli.user_errors():
        config = resolve(_configure(given))
        folder = cli.run_to_continue(
            given.get("run_dir"), dump_config(config), is_complete, is_auto=resume == cli.AUTO
        )
    return _start(config, given.get("run_dir")) if folder is None else _continue(folder)


def limit_memory() -> None:
    """
    Have libraries keep less memory; before networks run.

    Dispatch gives encoders batches of every size, and for each that they have seen oneDNN keeps a
    kernel and torch a description: 1024 of them take more memory than the networks. glibc gives
    each emulator's thread a heap of its own, where what a ROM leaves when it is loaded anew fits no
    other thread.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


def _start(config: RunConfig, run_dir: Path | None) -> int:
    with cli.user_errors():
        folder = run_dir or default_run_dir(config)
        check_new_run(folder)
        model = _build(config)
        create_run(folder, config)
    if (reason := config.why_nothing_is_learned()) is not None:
        print(reason, file=sys.stderr)
    with cli.holding(folder):
        return _train(model, config, folder)


def _resume(folder: Path, given: dict[str, Any]) -> int:
    n_timesteps = given.pop("n_timesteps", None)
    with cli.user_errors():
        cli.refuse_beside_resume(given)
    return _continue(folder, n_timesteps)


def _continue(folder: Path, n_timesteps: str | None = None) -> int:
    """
    Train a run to its end.

    :param n_timesteps: which is after so many steps from now on; None: where it was
    """
    with cli.user_errors():
        config = open_run(folder)
    with cli.holding(folder):
        # An environment may fail where its actions are played again.
        with cli.user_errors(), cli.failures(EnvironmentFaultError):
            repair_state(checkpoint_dir(folder, "last"))
            if n_timesteps is not None:
                config = _lengthen(folder, config, n_timesteps)
            if is_complete(folder):
                longer = f"--resume {folder} -n N makes it longer"
                print(f"{folder} is complete: {_n_done(folder):,} steps; {longer}")
                return 0
            model, n_rollbacks = _restored(config, folder)
        is_begun = has_state(checkpoint_dir(folder, "last"))
        at = f"goes on at {model.num_timesteps:,} steps"
        print(at if is_begun else "no checkpoint yet: begins anew", flush=True)
        return _train(model, config, folder, n_rollbacks)


def _lengthen(folder: Path, config: RunConfig, n_timesteps: str) -> RunConfig:
    """
    Change how many steps a run has in all, also in its folder: schedules follow it from now on.

    :raises ValueError: if that is no number, or not above the steps that are done
    """
    train = config.train.model_dump() | {"n_timesteps": n_timesteps}
    config = parse_config(config.model_dump() | {"train": train})
    done = _n_done(folder)
    if config.train.n_timesteps <= done:
        raise ValueError(f"-n {n_timesteps}, but {folder} has made {done:,} steps: give more")
    replace_config(folder, dump_config(config))
    return config


def _n_done(folder: Path) -> int:
    checkpoint = checkpoint_dir(folder, "last")
    return read_state(checkpoint, Progress)["num_timesteps"] if has_state(checkpoint) else 0


def is_complete(folder: Path) -> bool:
    """Whether all steps of a run are done, and no signal cut the last evaluation short."""
    if not has_state(checkpoint_dir(folder, "last")):
        return False
    train, timesteps = open_run(folder).train, _n_done(folder)
    file = folder / EVALUATIONS_FILE
    evaluated = [cell_number(row, "timesteps", file) for row in read_rows(file)]
    is_evaluated = train.eval_freq == 0 or max(evaluated, default=0) >= timesteps
    return timesteps >= train.n_timesteps and is_evaluated


def _build(config: RunConfig) -> BaseAlgorithm:
    env = make_env(config, config.env.n_envs, training=True)
    with memory_errors(config):
        check_memory(config, env.observation_space)
        return build_model(config, env)


def _restored(
    config: RunConfig, folder: Path, n_rollbacks: int | None = None
) -> tuple[BaseAlgorithm, int]:
    """
    The model at the run's last checkpoint, untrained if there is none yet.

    :param n_rollbacks: how often the run was rolled back; None: as the checkpoint says
    """
    model, saved_rollbacks = _build(config), 0
    checkpoint = checkpoint_dir(folder, "last")
    if has_state(checkpoint):
        saved_rollbacks = continue_run(model, checkpoint, restore_env).get("n_rollbacks", 0)
    if n_rollbacks is None:
        n_rollbacks = saved_rollbacks
    scale_learning_rate(model, ROLLBACK_SCALE**n_rollbacks)
    model._update_current_progress_remaining(model.num_timesteps, config.train.n_timesteps)
    return model, n_rollbacks


def _configure(given: dict[str, Any]) -> RunConfig:
    """The file's configuration with the options that were given."""
    overrides, named = given_settings(RunConfig, KEYS, given)
    hub = str(overrides.get("hub.name", ""))
    _refuse_hub_settings(hub, named)
    if "algorithm.name" in overrides:
        raise ValueError("--set algorithm.name: the algorithm is chosen by --algo")
    if overrides.get("hub.always_active") in (("none",), ["none"], "none"):
        overrides["hub.always_active"] = []
    file = given.get("config") or built_in_config(given.get("algo", "ppo"))
    if hub not in ("", "none"):  # the file's settings are of another hub
        overrides.setdefault("hub.always_active", "auto")
        if _is_single(hub) or _is_single(load_config(file).hub.name):
            overrides.setdefault("hub.top_k", "auto")
    config = load_config(file, overrides)
    _refuse_hub_settings(config.hub.name, named)
    if given.get("algo", config.algorithm.name) != config.algorithm.name:
        raise ValueError(f"--algo {given['algo']}, but {file} is for {config.algorithm.name}")
    return config


def _is_single(hub: str) -> bool:
    with contextlib.suppress(ValueError):  # a file's hub may be gone, or be none
        return len(load_hub(hub, weights=False).encoders) == 1
    return False


def _refuse_hub_settings(hub: str, named: Mapping[str, str]) -> None:
    """
    :param named: how the user gave each key
    :raises ValueError: if one means nothing without a hub
    """
    for key, option in named.items():
        if hub == "none" and key.startswith("hub.") and key not in ("hub.name", "hub.precision"):
            raise ValueError(f"{option} has no meaning with --hub none")


def _train(model: BaseAlgorithm, config: RunConfig, folder: Path, n_rollbacks: int = 0) -> int:
    """Train to the end or to a signal; returns the exit code."""
    note_command(folder)
    print(f"run folder: {folder}", flush=True)
    stop = StopSignal()
    with stop.caught(), cli.failures(NotSavedError, DamagedFileError, OutOfMemoryError, OSError):
        while True:
            try:
                _learn(model, config, folder, stop, n_rollbacks)
            except NotFiniteError as error:
                n_rollbacks += 1
                _check_rollbacks(error, n_rollbacks, config)
                _let_go(model, error)
                with cli.user_errors(), cli.failures(EnvironmentFaultError):
                    model, _ = _restored(config, folder, n_rollbacks)
                print(f"{error}: back to step {model.num_timesteps:,} at half the learning rate")
            else:
                if stop.number is None:
                    return 0
                print(f"stopped at {model.num_timesteps:,} steps; --resume {folder} goes on")
                return 128 + stop.number


def _let_go(model: BaseAlgorithm, error: NotFiniteError) -> None:
    """Close its environments, and free its replay buffer: another may have no room beside it."""
    # Frames of the training hold the buffer, too.
    error.__traceback__ = error.__cause__ = error.__context__ = None
    env = model.get_env()
    assert env is not None
    env.close()
    if isinstance(model, OffPolicyAlgorithm):
        model.replay_buffer = None
    gc.collect()


def _learn(
    model: BaseAlgorithm, config: RunConfig, folder: Path, stop: StopSignal, n_rollbacks: int
) -> None:
    train = config.train
    n_eval_envs = min(config.env.n_envs, train.n_eval_episodes)
    logger = make_logger(folder, model.num_timesteps)
    model.set_logger(logger)
    watch_gradients(model)
    checkpoints = CheckpointCallback(folder, train, stop, env_state, n_rollbacks)
    callbacks: list[BaseCallback] = [
        EpisodesCallback(folder),
        checkpoints,
        EvaluationCallback(folder, partial(make_env, config, n_eval_envs), train, stop),
        ProgressCallback(),
    ]
    if config.hub.name != "none":
        callbacks.insert(0, PathwayCallback())
        callbacks.append(EncodersCallback())
    try:
        with memory_errors(config), policy_errors(model):
            model.learn(
                train.n_timesteps - model.num_timesteps,
                callback=callbacks,
                log_interval=None,  # type: ignore[arg-type]
                reset_num_timesteps=False,
                progress_bar=sys.stdout.isatty(),
            )
    except EnvironmentFaultError as error:
        checkpoints.save_after_fault()
        file = folder / FAULT_FILE
        file.write_text(json.dumps({"env": config.env.id, **error.record}, indent=1))
        raise click.ClickException(
            f"{error}; {file} has the actions; once it is mended, --resume {folder} goes on"
        ) from error
    finally:
        logger.close()


def _check_rollbacks(error: NotFiniteError, n_rollbacks: int, config: RunConfig) -> None:
    """
    :raises click.ClickException: if the run was rolled back often enough
    """
    if n_rollbacks > config.train.n_rollbacks:
        raise click.ClickException(f"{error}; {advice('algorithm.learning_rate')}") from error


if __name__ == "__main__":
    cli.run(command, "python -m hubrl.train")
