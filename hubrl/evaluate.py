"""``hubrl evaluate``: plays whole games with a run's agent and prints the mean return."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from hubrl import cli

cli.refuse_foreign_modules("agents", "envs")

from agents.algorithms import build_model  # noqa: E402
from agents.checkpoints import load_checkpoint  # noqa: E402
from agents.config import RunConfig  # noqa: E402
from agents.evaluation import Episodes, bootstrap_interval, evaluate  # noqa: E402
from agents.runs import checkpoint_dir, derive_seed, open_run  # noqa: E402
from hubrl.train import make_env  # noqa: E402

N_ENVS = 8


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--episodes", type=click.IntRange(min=1), default=20, show_default=True)
@click.option(
    "--checkpoint", type=click.Choice(["best", "last"]), help="[default: best, where there is one]"
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), help="Of the games.  [default: from the run's]"
)
@click.option(
    "--json", "file", type=click.Path(path_type=Path), help="[default: RUN/evaluation.json]"
)
def command(
    run: Path, episodes: int, checkpoint: str | None, seed: int | None, file: Path | None
) -> None:
    """
    Play whole games with the agent of the folder RUN.

    Prints the mean unclipped return with a 95 % bootstrap interval. The games are others than those
    by which training chose the best checkpoint. As in training, actions are sampled unless the
    configuration says deterministic_eval.
    """
    with cli.user_errors():
        config = open_run(run)
        if checkpoint is None:
            checkpoint = "best" if checkpoint_dir(run, "best").exists() else "last"
        env = make_env(config, min(N_ENVS, episodes))
        model = build_model(config, env)
        state = load_checkpoint(model, checkpoint_dir(run, checkpoint))
        file = file or run / "evaluation.json"
        if not file.parent.is_dir():
            raise ValueError(f"--json {file}: there is no folder {file.parent}")
    seed = derive_seed(config.train.seed, "evaluate") if seed is None else seed
    deterministic = config.train.deterministic_eval
    played = evaluate(model, env, episodes, deterministic=deterministic, seed=seed)
    assert played is not None
    facts = {"checkpoint": checkpoint, "timesteps": state["num_timesteps"], "seed": seed}
    result = _result(config, facts, played)
    file.write_text(json.dumps(result, indent=1) + "\n")
    low, high = result["interval_95"]
    click.echo(
        f"{config.env.id}, {checkpoint} checkpoint at {state['num_timesteps']:,} steps, "
        f"{episodes} games: mean return {result['mean_return']:.2f} "
        f"(95% interval {low:.2f} to {high:.2f})"
    )


def _result(config: RunConfig, facts: dict[str, Any], played: Episodes) -> dict[str, Any]:
    mean, low, high = bootstrap_interval(played.returns)
    return {
        "env": config.env.id,
        "algorithm": config.algorithm.name,
        "hub": config.hub.name,
        "sticky": config.env.sticky,
        "deterministic": config.train.deterministic_eval,
        **facts,
        "mean_return": mean,
        "interval_95": [low, high],
        "returns": played.returns,
        "lengths": played.lengths,
    }


if __name__ == "__main__":
    cli.run(command, "python -m hubrl.evaluate")
