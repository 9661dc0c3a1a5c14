"""``hubrl export``: a run's agent as an ONNX graph, or distilled into one encoder."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm

from hubrl import cli
from hubrl.files import is_taken
from hubrl.finite import NotFiniteError
from hubrl.plots import import_matplotlib
from hubrl.run_folder import CsvTable, note_command
from hubrl.specs import load_hub

cli.refuse_foreign_modules("agents", "envs")

from agents.algorithms import build_model  # noqa: E402
from agents.callbacks import LINE_SECONDS  # noqa: E402
from agents.checkpoints import load_checkpoint, save_checkpoint  # noqa: E402
from agents.config import RunConfig  # noqa: E402
from agents.evaluation import evaluate, returns_report, returns_text  # noqa: E402
from agents.runs import (  # noqa: E402
    best_checkpoint,
    checkpoint_dir,
    create_run,
    derive_seed,
    open_run,
)
from envs import EnvironmentFaultError  # noqa: E402
from hubrl.exporting.distillation import CHUNK_STEPS, Distillation, acting_seconds  # noqa: E402
from hubrl.exporting.graph import (  # noqa: E402
    acts_of_graph,
    acts_of_policy,
    equal_actions,
    import_onnx,
    write_graph,
)
from hubrl.exporting.outputs import check_policy  # noqa: E402
from hubrl.exporting.play import Games, Images, half_random  # noqa: E402
from hubrl.games import image_format, make_env  # noqa: E402
from hubrl.pretraining.figures import draw_losses  # noqa: E402

N_ENVS = 8
N_OBSERVATIONS = 1000
N_TEST_STEPS = 125  # of each game: 1,000 observations
N_STEPS = 20_000
N_EPISODES = 20
REPORT_FILE = "report.json"
FORMATS = ("onnx", "distilled")


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(FORMATS), required=True)
@click.option(
    "--checkpoint", type=click.Choice(["best", "last"]), help="[default: best, where there is one]"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="File or folder.  [default: RUN/export/agent.onnx, RUN/export/distilled]",
)
@click.option(
    "-n",
    "--n-steps",
    type=click.IntRange(min=N_ENVS * CHUNK_STEPS),
    help=f"distilled: agent steps of play.  [default: {N_STEPS:,}]",
)
@click.option(
    "--episodes",
    type=click.IntRange(min=1),
    help=f"distilled: games of each agent for its return.  [default: {N_EPISODES}]",
)
def command(
    run: Path,
    form: str,
    checkpoint: str | None,
    out: Path | None,
    n_steps: int | None,
    episodes: int | None,
) -> int:
    """
    Make the agent of the folder RUN ready for use elsewhere.

    onnx: a graph from uint8 observations to the deterministic actions and their scores, compared
    with the agent on 1,000 observations; of a MaskablePPO agent it takes no masks, so mask the
    scores. distilled: an agent of one encoder, SB3's NatureCNN, that was taught to answer as the
    hub's agent does; a folder of a run, with both agents' returns in report.json.
    """
    with cli.user_errors():
        config = open_run(run)
        if checkpoint is None:
            checkpoint = best_checkpoint(run)
        if form == "onnx" and (n_steps, episodes) != (None, None):
            raise ValueError("-n and --episodes have no meaning with --format onnx")
        if out is not None and not out.absolute().parent.is_dir():
            raise ValueError(f"--out {out}: there is no folder {out.parent}")
    saved = checkpoint_dir(run, checkpoint)
    with cli.failures(EnvironmentFaultError, NotFiniteError, OSError):
        if form == "onnx":
            return _export_onnx(config, saved, out or run / "export" / "agent.onnx")
        folder = out or run / "export" / "distilled"
        _export_distilled(config, saved, folder, n_steps or N_STEPS, episodes or N_EPISODES)
    return 0


def _export_onnx(config: RunConfig, saved: Path, file: Path) -> int:
    """Write the graph if its actions are the agent's; returns the exit code."""
    with cli.user_errors():
        import_onnx()
        if file.is_dir():
            raise ValueError(f"--out {file} is a folder, but a graph is a file")
        exact = _with(config, "train", device="cpu")
        agent = _agent(_with(exact, "hub", precision="float32"), saved)
        check_policy(agent.policy)
    observations = _observations(agent, config.train.seed)  # first: the graph takes far longer
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_name(f".{file.name}.new")
    try:
        write_graph(agent.policy, temporary)
        if not _is_same(agent, temporary, observations):
            return 1
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    if config.hub.precision != "float32":
        _compare_precisions(_agent(exact, saved), file, observations, config.hub.precision)
    _print_graph(file, observations)
    return 0


def _is_same(agent: BaseAlgorithm, file: Path, observations: Images) -> bool:
    """Whether the graph acts as the agent does; prints how much they differ."""
    ours, theirs = acts_of_graph(file, observations), acts_of_policy(agent.policy, observations)
    equal = equal_actions(ours, theirs, agent.action_space)
    difference = np.abs(ours.scores - theirs.scores).max()
    largest = np.abs(theirs.scores).max()
    click.echo(
        f"actions equal the agent's on {equal.sum():,} of {len(equal):,} observations; "
        f"scores differ by at most {difference:.2g}, the largest is {largest:.3g}"
    )
    if not equal.all():
        click.echo("hubrl export: error: the graph is not the agent; nothing is written", err=True)
    return bool(equal.all())


def _compare_precisions(
    agent: BaseAlgorithm, file: Path, observations: Images, precision: str
) -> None:
    ours, theirs = acts_of_graph(file, observations), acts_of_policy(agent.policy, observations)
    equal = equal_actions(ours, theirs, agent.action_space)
    click.echo(
        f"the agent was trained in {precision}, the graph computes in float32: "
        f"{equal.sum():,} of {len(equal):,} actions equal those in {precision}"
    )


def _print_graph(file: Path, observations: Images) -> None:
    acts = acts_of_graph(file, observations[:1])
    shapes = [list(part.shape[1:]) for part in (observations, *acts)]
    click.echo(
        f"{file}: {file.stat().st_size / 1e6:.2f} MB; for a batch of observations {shapes[0]} "
        f"uint8 it gives actions {shapes[1]} {acts.actions.dtype} and scores {shapes[2]} float32"
    )


def _observations(agent: BaseAlgorithm, seed: int) -> Images:
    """Of the agent's own play and of random play."""
    env = agent.get_env()
    assert env is not None
    games = Games([env], derive_seed(seed, "export"))
    (images,) = games.play(-(-N_OBSERVATIONS // N_ENVS), half_random(agent))
    return images[:N_OBSERVATIONS]


def _export_distilled(
    config: RunConfig, saved: Path, folder: Path, n_steps: int, n_episodes: int
) -> None:
    with cli.user_errors():
        _check_teacher(config)
        import_matplotlib()
        if is_taken(folder):
            raise ValueError(f"--out {folder} exists; give another, or remove it")
        teacher = _agent(config, saved)
        check_policy(teacher.policy)
        n_steps -= n_steps % (N_ENVS * CHUNK_STEPS)
        student_config = _student_config(config, n_steps)
        env = _student_env(teacher, config, student_config)
        student = build_model(student_config, env, learns=False)
    folder.parent.mkdir(exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        create_run(temporary, student_config)
        note_command(temporary)
        report = _distill(teacher, student, config, temporary, n_steps)
        report |= _measure(teacher, student, config, n_episodes)
        facts = {
            "env": config.env.id,
            "algorithm": config.algorithm.name,
            "hub": config.hub.name,
            "checkpoint": saved.name,
            "timesteps": teacher.num_timesteps,
            "command": shlex.join(sys.orig_argv),
        }
        (temporary / REPORT_FILE).write_text(json.dumps(facts | report, indent=1) + "\n")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    click.echo(f"{folder}: hubrl evaluate opens it, {REPORT_FILE} has the numbers")


def _distill(
    teacher: BaseAlgorithm, student: BaseAlgorithm, config: RunConfig, folder: Path, n_steps: int
) -> dict[str, Any]:
    """Teach the student and keep it with its losses; returns what the report says of it."""
    seed = derive_seed(config.train.seed, "distillation")
    envs = [agent.get_env() for agent in (teacher, student)]
    views = [env for env in dict.fromkeys(envs) if env is not None]
    distillation = Distillation(teacher, student, Games(views, seed), n_steps)
    losses, last_line = folder / "losses.csv", time.monotonic()
    table = CsvTable(losses, "frames", 0)
    with cli.user_errors():  # games that are not deterministic
        for row in distillation.run():
            table.append(row)
            if time.monotonic() - last_line >= LINE_SECONDS or row["frames"] == n_steps:
                click.echo(_progress_line(row, n_steps))
                last_line = time.monotonic()
        test = distillation.test(N_TEST_STEPS)
    student.num_timesteps = n_steps
    save_checkpoint(student, checkpoint_dir(folder, "last"), {})
    draw_losses(losses, folder / "losses.png", _title(config))
    click.echo("on fresh play: " + _numbers(test))
    return {"n_steps": n_steps, "n_updates": int(row["update"]), "seed": seed, "final": test}


def _measure(
    teacher: BaseAlgorithm, student: BaseAlgorithm, config: RunConfig, n_episodes: int
) -> dict[str, Any]:
    """Both agents' returns on the same games, and how fast they act."""
    seed = derive_seed(config.train.seed, "export evaluation")
    deterministic = config.train.deterministic_eval
    report: dict[str, Any] = {"evaluation_seed": seed, "deterministic": deterministic}
    for name, agent in {"teacher": teacher, "student": student}.items():
        env = agent.get_env()
        assert env is not None
        played = evaluate(agent, env, n_episodes, deterministic=deterministic, seed=seed)
        assert played is not None  # nothing stops it
        report[name] = returns_report(played)
        click.echo(f"{name}: {returns_text(report[name])}")
    return report | {"seconds_per_predict": _speeds(teacher, student)}


def _speeds(teacher: BaseAlgorithm, student: BaseAlgorithm) -> dict[str, Any]:
    """How fast the agents act, alone and for 8 games at once."""
    agents, speeds = (teacher, student), {}
    for batch in (1, 8):
        slow, fast = acting_seconds(agents, [_first_images(agent, batch) for agent in agents])
        speeds[f"batch_{batch}"] = {"teacher": slow, "student": fast, "ratio": slow / fast}
        click.echo(
            f"batch of {batch}: teacher {slow * 1e3:.2f} ms, student {fast * 1e3:.2f} ms, "
            f"{slow / fast:.2f} times as fast"
        )
    return speeds


def _first_images(agent: BaseAlgorithm, batch: int) -> Images:
    """Observations of the start of games, (B, C, H, W)."""
    env = agent.get_env()
    assert env is not None
    observations: Any = env.reset()
    images: Images = observations
    return images[:batch]


def _agent(config: RunConfig, saved: Path) -> BaseAlgorithm:
    agent = build_model(config, make_env(config, N_ENVS), learns=False)
    load_checkpoint(agent, saved)
    return agent


def _check_teacher(config: RunConfig) -> None:
    hub = config.hub.name
    if hub == "none" or len(load_hub(hub, weights=False).encoders) == 1:
        raise ValueError(
            f"--format distilled, but the run has hub {hub!r}: its agent is one encoder already; "
            "--format onnx takes it"
        )


def _student_config(config: RunConfig, n_steps: int) -> RunConfig:
    alone = _with(
        config, "hub", name="none", always_active=(), freeze=(), random_init=False, top_k=1
    )
    return _with(alone, "train", n_timesteps=n_steps)


def _student_env(teacher: BaseAlgorithm, config: RunConfig, student: RunConfig) -> Any:
    """The teacher's, unless the student sees other images."""
    seen = [dataclasses.replace(image_format(c.hub.name), min_size=1) for c in (config, student)]
    if seen[0] == seen[1]:
        return teacher.get_env()
    return make_env(student, N_ENVS)


def _with(config: RunConfig, section: str, **changes: Any) -> RunConfig:
    changed = getattr(config, section).model_copy(update=changes)
    return config.model_copy(update={section: changed})


def _progress_line(row: dict[str, float], n_steps: int) -> str:
    losses = {name: value for name, value in row.items() if name not in ("update", "frames")}
    share = row["frames"] / n_steps
    return f"{row['frames']:,.0f} steps ({share:.1%})  {_numbers(losses)}"


def _numbers(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in values.items())


def _title(config: RunConfig) -> str:
    return f"A student of one encoder and its {config.algorithm.name} teacher on {config.env.id}"


if __name__ == "__main__":
    cli.run(command, "python -m hubrl.export")
