"""``hubrl evaluate``: plays whole games with a run's agent and prints the mean return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from hubrl import cli
from hubrl.finite import NotFiniteError

cli.refuse_foreign_modules("agents", "envs")

from agents.algorithms import build_model  # noqa: E402
from agents.checkpoints import load_checkpoint  # noqa: E402
from agents.config import RunConfig  # noqa: E402
from agents.evaluation import Episodes, evaluate, returns_report, returns_text  # noqa: E402
from agents.runs import best_checkpoint, checkpoint_dir, derive_seed, open_run  # noqa: E402
from agents.zips import algorithm_of, hub_of, rebuild  # noqa: E402
from envs import EnvironmentFaultError, make_vec_env, with_action_masks  # noqa: E402
from hubrl.games import image_format, make_env  # noqa: E402

N_ENVS = 8


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-n", "--episodes", type=click.IntRange(min=1), default=20, show_default=True)
@click.option(
    "--checkpoint",
    type=click.Choice(["best", "last"]),
    help="Of a run.  [default: best, where there is one]",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), help="Of the games.  [default: from the run's]"
)
@click.option(
    "--json",
    "file",
    type=click.Path(path_type=Path),
    help="Where the returns are written.  [default: RUN/evaluation.json; of a zip nowhere]",
)
@click.option("--env", help="Where the agent of a zip plays; Gymnasium id.")
@click.option("--algo", help="What the agent of a zip was trained with.  [default: as it says]")
def command(
    run: Path,
    episodes: int,
    checkpoint: str | None,
    seed: int | None,
    file: Path | None,
    env: str | None,
    algo: str | None,
) -> None:
    """
    Play whole games with the agent of the folder RUN, or of a zip that SB3's save has written.

    Prints the mean unclipped return with a 95 % bootstrap interval (none for one game). The games
    are others than those by which training chose the best checkpoint. As in training, actions
    are sampled, unless the run's configuration says deterministic_eval.
    """
    with cli.user_errors():
        cli.check_output("--json", file)
        if run.is_file() and checkpoint is not None:
            raise ValueError("--checkpoint is for a run's folder: a zip holds one agent")
    if run.is_file():
        _evaluate_zip(run, algo, env, episodes, seed or 0, file)
        return
    with cli.user_errors():
        if env or algo:
            raise ValueError(
                f"{run} is no file, but --env and --algo are for an agent's zip: a run's folder "
                "knows them"
            )
        config = open_run(run)
        if checkpoint is None:
            checkpoint = best_checkpoint(run)
        file = file or run / "evaluation.json"
        cli.check_output("--json", file)
        games = make_env(config, min(N_ENVS, episodes))
        model = build_model(config, games, learns=False)
        state = load_checkpoint(model, checkpoint_dir(run, checkpoint))
    seed = derive_seed(config.train.seed, "evaluate") if seed is None else seed
    deterministic = config.train.deterministic_eval
    played = _play(model, games, episodes, deterministic, seed)
    facts = {"checkpoint": checkpoint, "timesteps": state["num_timesteps"], "seed": seed}
    result = _result(config, facts, played)
    where = f"{config.env.id}, {checkpoint} checkpoint at {state['num_timesteps']:,} steps"
    click.echo(f"{where}, {returns_text(result)}")
    _write(result, file)


def _evaluate_zip(
    agent: Path, algo: str | None, env: str | None, episodes: int, seed: int, file: Path | None
) -> None:
    with cli.user_errors():
        if env is None:
            raise ValueError(f"{agent} doesn't say where its agent plays: give --env")
        algo = algo or algorithm_of(agent)
        played = _play_zip(agent, algo, env, episodes, seed)
    result: dict[str, Any] = {"env": env, "algorithm": algo, "deterministic": False, "seed": seed}
    result |= returns_report(played)
    click.echo(f"{env}, {agent}, {returns_text(result)}")
    if file is not None:
        _write(result, file)


def _play_zip(file: Path, algo: str, env: str, episodes: int, seed: int) -> Episodes:
    """Sampled actions, as by default in training."""
    image = image_format(hub_of(file))
    lives_end = algo == "recurrent_ppo"  # as hubrl.games.make_env
    n_envs = min(N_ENVS, episodes)
    games = make_vec_env(env, n_envs, training=False, lives_end=lives_end, image=image)
    if algo == "maskable_ppo":
        games = with_action_masks(games)
    return _play(rebuild(file, algo, games), games, episodes, False, seed)


def _play(
    model: BaseAlgorithm, games: VecEnv, episodes: int, deterministic: bool, seed: int
) -> Episodes:
    with cli.failures(EnvironmentFaultError, NotFiniteError):
        played = evaluate(model, games, episodes, deterministic=deterministic, seed=seed)
    assert played is not None  # nothing stops it
    return played


def _result(config: RunConfig, facts: dict[str, Any], played: Episodes) -> dict[str, Any]:
    return {
        "env": config.env.id,
        "algorithm": config.algorithm.name,
        "hub": config.hub.name,
        "sticky": config.env.sticky,
        "deterministic": config.train.deterministic_eval,
        **facts,
        **returns_report(played),
    }


def _write(result: dict[str, Any], file: Path) -> None:
    with cli.failures(OSError):
        file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(command, "python -m hubrl.evaluate")
