"""``hubrl study``: trains variants on games with seeds, and compares them with intervals."""

from __future__ import annotations

import contextlib
import fcntl
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import click

from hubrl import cli
from hubrl.files import DamagedFileError
from hubrl.plots import import_matplotlib
from hubrl.run_folder import CONFIG_FILE
from hubrl.sections import read_mapping, with_later_keys
from hubrl.signals import StopSignal
from hubrl.state_folder import read_state

cli.refuse_foreign_modules("agents", "envs")

from agents.algorithms import build_model, resolve  # noqa: E402
from agents.checkpoints import Progress  # noqa: E402
from agents.config import LATER_KEYS, RunConfig, dump_config  # noqa: E402
from agents.runs import checkpoint_dir  # noqa: E402
from hubrl.games import make_env  # noqa: E402
from hubrl.studies.config import Run, StudyConfig, load_study  # noqa: E402
from hubrl.studies.engines import (  # noqa: E402
    Job,
    can_resume,
    import_ray,
    run_local,
    run_ray,
)
from hubrl.studies.figures import draw  # noqa: E402
from hubrl.studies.report import Source, read_source, write_report  # noqa: E402
from hubrl.studies.results import collect  # noqa: E402
from hubrl.train import is_complete  # noqa: E402

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command("study")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--out", type=FOLDER, help="Of the runs.  [default: studies/NAME]")
@click.option("--results", type=FOLDER, help="Of tables and figures.  [default: docs/studies/NAME]")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="ray: the cluster of RAY_ADDRESS, which shares the folder of the runs; runs on a GPU "
    "have one each.",
)
@click.option("--jobs", type=click.IntRange(min=1), help="Runs at a time.  [default: all cores]")
@click.option("--only", type=click.Choice(["run", "collect"]), help="Train, or make the results.")
def command(
    file: Path,
    out: Path | None,
    results: Path | None,
    engine: str,
    jobs: int | None,
    only: str | None,
) -> int:
    """
    Compare the variants of the study FILE: YAML with games, seeds and variants, such as those in
    configs/studies. Writes report.md, tables as CSV, and figures.

    Each run is a process of its own at low priority. What is complete is skipped and what is
    unfinished resumed, so the same command goes on after a stop. A run that fails does not stop
    the others.
    """
    out = out or Path("studies", file.stem)
    results = results or Path("docs", "studies", file.stem)
    with cli.user_errors():
        study = load_study(file)
        source = read_source(study, file)
        if jobs and engine == "ray":
            raise ValueError("--jobs and --engine ray: the cluster decides how many run at a time")
        if only != "run":
            import_matplotlib()
        if only == "collect":
            return _collect(study, source, out, results)
        if engine == "ray":
            import_ray()
        left = _unfinished(study, out)
        _check_devices(left.values(), engine)
        _check(left)
        cli.check_output_folder("--out", out)
        if only != "run":
            cli.check_output_folder("--results", results)
    with cli.failures(OSError):
        failed, stopped = _train(left, out, engine, jobs)
    if stopped:
        print(f"stopped; the same command goes on in {out}")
        return stopped
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    if only != "run":
        try:
            _collect(study, source, out, results)
        except (OSError, ValueError) as error:
            print(f"no results: {error}", file=sys.stderr)
            return 1
    return 1 if failed else 0


def _unfinished(study: StudyConfig, out: Path) -> dict[Run, RunConfig]:
    """
    The runs that are left to do.

    :raises ValueError: if a setting is wrong, or a run's folder was made by another one
    """
    left = {}
    for run in study.runs():
        folder = out / "runs" / run.path
        config = _resolve(study, run)
        if can_resume(folder):
            _check_same(folder, config)
        try:
            if is_complete(folder):
                continue
        except DamagedFileError:
            pass  # its training tells, and the others go on
        left[run] = config
    return left


def _measurable(study: StudyConfig, out: Path) -> list[Run]:
    """
    The runs that have the study's steps; it may ask for fewer than they were made with.

    :raises ValueError: if a run was made by other settings
    """
    found = []
    for run in study.runs():
        folder = out / "runs" / run.path
        if not can_resume(folder):
            continue
        config = study.run_config(run)
        # A hub, or a device, may be only where the runs were made.
        with contextlib.suppress(ValueError):
            config = resolve(config)
        _check_same(folder, config, is_measured=True)
        try:
            n_timesteps = read_state(checkpoint_dir(folder, "last"), Progress)["num_timesteps"]
        except DamagedFileError as error:
            print(f"{run} is left out: {error}", file=sys.stderr)
            continue
        if n_timesteps >= study.n_timesteps:
            found.append(run)
    return found


def _resolve(study: StudyConfig, run: Run) -> RunConfig:
    config = study.run_config(run)
    try:
        return resolve(config)
    except ValueError as error:
        raise ValueError(f"variant {run.variant}: {error}") from None


def _check_same(folder: Path, config: RunConfig, *, is_measured: bool = False) -> None:
    """
    Whatever the precision, which may have been measured elsewhere.

    :param is_measured: the run is not gone on with; so it may have more steps, and its hub's folder
        may be one of another machine
    :raises ValueError: if the run in the folder was made by other settings
    """
    others = {("hub", "precision"), *([("train", "n_timesteps")] if is_measured else [])}
    new = config.model_dump(mode="json")
    for section, values in with_later_keys(read_mapping(folder / CONFIG_FILE), LATER_KEYS).items():
        for key, value in values.items():
            now = new.get(section, {}).get(key)
            if (section, key) == ("hub", "name") and is_measured and not Path(value).exists():
                value, now = Path(value).name, Path(now).name
            if now not in (value, "auto", ["auto"]) and (section, key) not in others:
                raise ValueError(
                    f"{folder} has {section}.{key} {value!r}, but the study says {now!r}: "
                    "give another --out, or delete that run"
                )


def _check(configs: Mapping[Run, RunConfig]) -> None:
    """
    Build what each variant and each game needs, before hours of training.

    :raises ValueError: if a hub, an encoder, ``top_k``, a game or a space doesn't fit
    """
    variants, games = set[str](), set[str]()
    for run, config in configs.items():
        if run.variant in variants and run.game in games:
            continue
        env = make_env(config, config.env.n_envs, training=True)
        if run.variant not in variants:
            try:
                build_model(config, env)
            except ValueError as error:
                raise ValueError(f"variant {run.variant}: {error}") from None
        env.close()
        variants.add(run.variant)
        games.add(run.game)


def _check_devices(configs: Iterable[RunConfig], engine: str) -> None:
    for config in configs:
        if engine == "ray" and config.train.device not in ("auto", "cpu", "cuda"):
            raise ValueError(
                f"train.device is {config.train.device!r}, allowed with --engine ray, which gives "
                "each run a GPU of its own: auto, cpu, cuda"
            )


def _train(
    configs: Mapping[Run, RunConfig], out: Path, engine: str, n_parallel: int | None
) -> tuple[list[str], int]:
    """Run what is left; lines about what failed, and the exit code of a stop by a signal or 0."""
    failed: list[str] = []
    stop, started = StopSignal(), time.monotonic()
    n_ended = 0

    def on_end(job: Job, code: int) -> None:
        nonlocal n_ended
        n_ended += 1
        seconds = time.monotonic() - started
        state = "done" if code == 0 else f"exit code {code}"
        _print(f"[{n_ended}/{len(configs)}] {job.run}: {state}, after {seconds:,.0f} s")
        if code != 0 and stop.number is None:
            failed.append(f"{job.run}: exit code {code}, {job.log}: {_last_line(job.log)}")

    _print(f"{len(configs)} runs to do in {out}")
    with _locked(out) as lock:
        jobs = [_prepare(Job(run, out.absolute()), config) for run, config in configs.items()]
        if engine == "ray":
            run_ray(jobs, stop, on_end)
        else:
            run_local(jobs, n_parallel, stop, on_end, lock)
    return failed, 0 if stop.number is None else 128 + stop.number


def _prepare(job: Job, config: RunConfig) -> Job:
    job.config.parent.mkdir(parents=True, exist_ok=True)
    job.config.write_text(dump_config(config))
    return job


def _collect(study: StudyConfig, source: Source, out: Path, folder: Path) -> int:
    """Tables and figures of all complete runs."""
    done = _measurable(study, out)
    found = collect(study, done, out, folder)
    draw(study, found.tables, folder)
    write_report(study, source, found, [Job(run, out) for run in done], folder)
    if found.no_seconds is not None:
        _print(f"nothing at equal seconds: {found.no_seconds}")
    missing = len(study.runs()) - len(done)
    _print(f"results in {folder}" + (f"; {missing} runs are not complete" if missing else ""))
    return 0


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[int]:
    """
    Only one process at a time works on a folder; its trainings hold the lock as long as they live.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise click.UsageError(
                f"another study, or a training of it, is still at work in {out}: wait or stop it"
            ) from None
        yield file.fileno()


def _last_line(file: Path) -> str:
    lines: Sequence[str] = file.read_text(errors="replace").split("\n") if file.exists() else ()
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing printed")


def _print(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


if __name__ == "__main__":
    cli.run(command, "python -m hubrl.study")
