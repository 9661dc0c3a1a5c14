"""``python -m vision_tasks.report RUNS``: tables and figures of finished runs."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from hubrl import cli
from hubrl.files import DamagedFileError, checked, read_json
from hubrl.plots import import_matplotlib
from hubrl.run_folder import cell_number, read_rows
from vision_tasks.figures import draw_curves, draw_exploration, draw_routing, draw_scores
from vision_tasks.metrics import Interval, mean_over_seeds, paired_difference
from vision_tasks.routing import routing
from vision_tasks.runs import open_run
from vision_tasks.tasks import Classification, Landmarks
from vision_tasks.training import EPOCHS_FILE, RESULTS_FILE, Results

OURS = "hub-pathway"
TASKS: dict[str, type[Classification] | type[Landmarks]] = {
    "classification": Classification,
    "landmarks": Landmarks,
}
MORE_IS_BETTER = {task.metric: task.is_more_better for task in TASKS.values()}
#: Settings in which runs of one method may differ and still be the same method.
IGNORED = (
    "method",
    "train.seed",
    "train.device",
    "train.n_workers",
    "train.save_freq",
    "data.root",
)


#: Methods whose models are what fine-tuning that encoder alone gives.
ALONE = ("ensemble-i", "logme")

#: Steps and scores of each seed, by data set and method.
Curves = dict[str, dict[str, list[list[tuple[int, float]]]]]


class Run(NamedTuple):
    """A finished run, or one of the single models that an ensemble's run gives."""

    folder: Path
    data: str
    method: str
    """With the settings in which runs of this method differ."""
    member: str
    """Name of the model in the run's results; empty for the method's own."""
    seed: int
    metric: str
    validation: float
    test: float
    seconds: float
    config: Mapping[str, Any]
    """By key path."""


class Row(NamedTuple):
    """A method on a data set, over seeds."""

    data: str
    method: str
    metric: str
    seeds: tuple[int, ...]
    test: Interval
    validation: Interval
    seconds: float
    difference: Interval | None
    """Of hub-pathway and this method on the seeds that both have; above 0 is better."""


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder.  [default: report in the first of RUNS]"
)
def command(runs: tuple[Path, ...], out: Path | None) -> None:
    """
    Tables and figures of all finished runs in the folders RUNS.

    The best single encoder is the one with the best validation score; nothing is chosen by test.
    """
    with cli.user_errors():
        import_matplotlib()
        found = read_runs(*runs)
        if not found:
            raise ValueError(f"there is no finished run in {', '.join(map(str, runs))}")
        curves = _curves(found)
    out = out or runs[0] / "report"
    out.mkdir(parents=True, exist_ok=True)
    rows = summarise(found)
    _write_csv(out / "runs.csv", [_run_cells(run) for run in found])
    _write_csv(out / "summary.csv", [_row_cells(row) for row in rows])
    pictures = "".join(f"\n![{what}]({name})\n" for name, what in _draw(rows, found, curves, out))
    (out / "report.md").write_text(_markdown(rows, found) + pictures)
    print(f"report in {out}")


def read_runs(*folders: Path) -> list[Run]:
    """
    The finished runs in some folders, at any depth; settings tell those of a method apart.

    :raises ValueError: if one's results or configuration are damaged
    """
    found = {file.resolve(): file for folder in folders for file in folder.rglob(RESULTS_FILE)}
    files = sorted(found.values())
    configs = {file: _flat(open_run(file.parent).model_dump(mode="json")) for file in files}
    runs = []
    for file in files:
        results, config = checked(read_json(file), Results, file), configs[file]
        alike = [
            c
            for c in configs.values()
            if (c["method"], c["data.name"]) == (config["method"], config["data.name"])
        ]
        try:
            runs += _runs_of(file.parent, results, config, _label(config, alike))
        except KeyError as error:
            raise DamagedFileError(f"{file} has no score {error}: train that run again") from None
    return runs


def summarise(runs: Sequence[Run]) -> list[Row]:
    """A row for each data set and method, the best first."""
    groups: dict[tuple[str, str], dict[int, Run]] = {}
    # A single model that was trained by itself comes before the same out of an ensemble's run.
    for run in sorted(runs, key=lambda run: run.member != ""):
        groups.setdefault((run.data, run.method), {}).setdefault(run.seed, run)
    rows = [_row(data, method, by_seed, groups) for (data, method), by_seed in groups.items()]
    return sorted(rows, key=lambda row: (row.data, -_sign(row.metric) * row.test.mean))


def best_single(rows: Iterable[Row], data: str) -> Row | None:
    """By validation score."""
    singles = [row for row in rows if row.data == data and row.method.startswith("single:")]
    return max(singles, key=lambda r: _sign(r.metric) * r.validation.mean, default=None)


def _runs_of(folder: Path, results: Results, config: Mapping[str, Any], label: str) -> list[Run]:
    metric = TASKS[results["task"]].metric
    runs = []
    for name, scores in results["test"].items():
        method = label if not name else _member_label(str(config["method"]), name, label)
        validation = results["validation"][name][metric]
        fields = (folder, results["data"], method, name, results["seed"], metric, validation)
        runs.append(Run(*fields, scores[metric], results["train_seconds"], config))
    return runs


def _label(config: Mapping[str, Any], alike: Sequence[Mapping[str, Any]]) -> str:
    differing = [
        key
        for key in config
        if key not in IGNORED and len({str(other.get(key)) for other in alike}) > 1
    ]
    settings = ", ".join(f"{key.split('.')[-1]}={config[key]}" for key in differing)
    return f"{config['method']} ({settings})" if settings else str(config["method"])


def _member_label(method: str, name: str, label: str) -> str:
    """As ``single:NAME`` where it is that, with the settings of its run."""
    return f"{'single' if method in ALONE else method}:{name}{label.removeprefix(method)}"


def _row(
    data: str,
    method: str,
    by_seed: Mapping[int, Run],
    groups: Mapping[tuple[str, str], Mapping[int, Run]],
) -> Row:
    runs = [by_seed[seed] for seed in sorted(by_seed)]
    metric, ours = runs[0].metric, groups.get((data, OURS), {})
    common = [seed for seed in sorted(by_seed) if seed in ours]
    difference = None
    if common and method != OURS:
        mine, theirs = ([g[s].test * _sign(metric) for s in common] for g in (ours, by_seed))
        difference = paired_difference(mine, theirs)
    return Row(
        data,
        method,
        metric,
        tuple(sorted(by_seed)),
        mean_over_seeds([run.test for run in runs]),
        mean_over_seeds([run.validation for run in runs]),
        sum(run.seconds for run in runs) / len(runs),
        difference,
    )


def _sign(metric: str) -> int:
    return 1 if MORE_IS_BETTER[metric] else -1


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    return flat


def _curves(runs: Sequence[Run]) -> Curves:
    """Validation scores by data set, method and seed: what ``epochs.csv`` of each run says."""
    curves: Curves = {}
    for run in runs:
        rows = read_rows(run.folder / EPOCHS_FILE)
        column = "/".join(filter(None, ("validation", run.member, run.metric)))
        points = [_point(row, column, run.folder / EPOCHS_FILE) for row in rows if row.get(column)]
        if points:
            curves.setdefault(run.data, {}).setdefault(run.method, []).append(points)
    return curves


def _point(row: Mapping[str, str], column: str, file: Path) -> tuple[int, float]:
    return int(cell_number(row, "step", file)), cell_number(row, column, file)


def _by_coefficient(runs: Sequence[Run]) -> dict[str, dict[float, list[float]]]:
    """Test scores of hub-pathway by data set and exploration coefficient."""
    scores: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        if run.config["method"] == OURS:
            coef = float(run.config["hub.exploration_coef"])
            scores.setdefault(run.data, {}).setdefault(coef, []).append(run.test)
    return {data: by_coef for data, by_coef in scores.items() if len(by_coef) > 1}


def _draw(
    rows: Sequence[Row], runs: Sequence[Run], curves: Curves, out: Path
) -> list[tuple[str, str]]:
    """Draw what there is to draw; names of the files, and what each shows."""
    drawn = [("scores.png", "Test scores")]
    draw_scores(rows, out / "scores.png")
    if curves:
        draw_curves(curves, out / "curves.png")
        drawn.append(("curves.png", "Validation while training"))
    by_coefficient = _by_coefficient(runs)
    if by_coefficient:
        draw_exploration(by_coefficient, out / "exploration.png")
        drawn.append(("exploration.png", "Test score over the exploration coefficient"))
    for data, run in {run.data: run for run in reversed(runs) if run.method == OURS}.items():
        name = f"routing-{data}.png"
        try:
            draw_routing(*routing(run.folder), out / name)
        except (ValueError, OSError) as error:  # data or hub are not on this machine
            print(f"no figure of the routing on {data}: {error}")
        else:
            drawn.append((name, f"Encoders that the images of each class of {data} activate"))
    return drawn


def _markdown(rows: Sequence[Row], runs: Sequence[Run]) -> str:
    lines = ["# Image tasks", ""]
    for data in dict.fromkeys(row.data for row in rows):
        of_data = [row for row in rows if row.data == data]
        lines += [f"## {data}", "", _settings(next(run for run in runs if run.data == data)), ""]
        metric = of_data[0].metric
        lines += [
            f"| method | seeds | test {metric} | validation | {OURS} less this | training s |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_markdown_row(row) for row in of_data]
        best = best_single(of_data, data)
        if best is not None:
            lines += ["", f"Best single encoder, by validation: {best.method}."]
        lines += [""]
    return "\n".join([*lines, FOOTER])


FOOTER = """Means over seeds with Student's t intervals of 95 %; a single seed has none. Differences
are taken seed by seed, and above 0 hub-pathway is better. Single models that come out of a run of
ensemble-i were trained in it side by side, so its time is that of all of them; METHOD:NAME are
models out of a run of that method.
"""


def _settings(run: Run) -> str:
    c = run.config
    return (
        f"Hub {c['hub.name']}, {c['data.image_size']} px, limit {c['data.limit']}, "
        f"{c['train.epochs']} epochs of batches of {c['train.batch_size']}, learning rate "
        f"{c['train.learning_rate']} (encoders x {c['train.encoder_lr_scale']})."
    )


def _markdown_row(row: Row) -> str:
    seeds = " ".join(map(str, row.seeds))
    difference = "" if row.difference is None else _percent(row.difference)
    test, validation = (_percent(i) for i in (row.test, row.validation))
    return f"| {row.method} | {seeds} | {test} | {validation} | {difference} | {row.seconds:.0f} |"


def _percent(interval: Interval) -> str:
    mean = f"{100 * interval.mean:.2f}"
    if interval.low is None or interval.high is None:
        return mean
    return f"{mean} [{100 * interval.low:.2f}, {100 * interval.high:.2f}]"


def _run_cells(run: Run) -> dict[str, Any]:
    return {
        "data": run.data,
        "method": run.method,
        "seed": run.seed,
        "metric": run.metric,
        "validation": run.validation,
        "test": run.test,
        "seconds": run.seconds,
    }


def _row_cells(row: Row) -> dict[str, Any]:
    cells: dict[str, Any] = {"data": row.data, "method": row.method, "metric": row.metric}
    cells["seeds"] = " ".join(map(str, row.seeds))
    for name in ("test", "validation", "difference"):
        interval = getattr(row, name)
        if interval is not None:
            cells |= {
                name: interval.mean,
                f"{name}_low": interval.low,
                f"{name}_high": interval.high,
            }
    return cells | {"seconds": row.seconds}


def _write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    cli.run(command, "python -m vision_tasks.report")
