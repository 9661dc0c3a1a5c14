"""``python -m vision_tasks.report RUNS``: tables and figures of finished runs."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from hubrl import cli
from hubrl.plots import import_matplotlib
from vision_tasks.figures import draw_curves, draw_exploration, draw_routing, draw_scores
from vision_tasks.metrics import Interval
from vision_tasks.results import (
    OURS,
    Curves,
    Row,
    Run,
    best_single,
    learning_curves,
    read_runs,
    scores_by_coefficient,
    summarise,
)
from vision_tasks.routing import Routing, routing


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
        curves = learning_curves(found)
        out = out or runs[0] / "report"
        out.mkdir(parents=True, exist_ok=True)
    rows = summarise(found)
    _write_csv(out / "runs.csv", [_run_cells(run) for run in found])
    _write_csv(out / "summary.csv", [_row_cells(row) for row in rows])
    _write_csv(out / "curves.csv", _curve_cells(curves))
    pictures = "".join(f"\n![{what}]({name})\n" for name, what in _draw(rows, found, curves, out))
    (out / "report.md").write_text(_markdown(rows, found) + pictures)
    print(f"report in {out}")


def _draw(
    rows: Sequence[Row], runs: Sequence[Run], curves: Curves, out: Path
) -> list[tuple[str, str]]:
    """Draw what there is to draw; names of the files, and what each shows."""
    drawn = [("scores.png", "Test scores")]
    draw_scores(rows, out / "scores.png")
    if curves:
        draw_curves(curves, out / "curves.png")
        drawn.append(("curves.png", "Validation while training"))
    by_coefficient = scores_by_coefficient(runs)
    if by_coefficient:
        draw_exploration(by_coefficient, out / "exploration.png")
        drawn.append(("exploration.png", "Test score over the exploration coefficient"))
    for data, run in _routed(rows, runs).items():
        name = f"routing-{data}"
        try:
            found = routing(run.folder)
        except (ValueError, OSError) as error:  # data or hub are not on this machine
            print(f"no figure of the routing on {data}: {error}")
        else:
            draw_routing(*found, out / f"{name}.png")
            _write_csv(out / f"{name}.csv", _routing_cells(found))
            what = f"Encoders that the images of each class of {data} activate"
            drawn.append((f"{name}.png", f"{what} ({run.method}, seed {run.seed})"))
    return drawn


def _routed(rows: Sequence[Row], runs: Sequence[Run]) -> dict[str, Run]:
    """For each data set of labelled images a run of hub-pathway: of most seeds, the first."""
    n_seeds = {(row.data, row.method): len(row.seeds) for row in rows}
    ours = [
        run
        for run in runs
        if run.config["method"] == OURS and run.config["task"] == "classification"
    ]
    ours.sort(key=lambda run: (n_seeds[run.data, run.method], -run.seed))
    return {run.data: run for run in ours}


def _curve_cells(curves: Curves) -> list[dict[str, Any]]:
    return [
        {"data": data, "method": method, "seed": seed, "step": step, "validation": round(score, 6)}
        for data, methods in curves.items()
        for method, seeds in methods.items()
        for seed, points in seeds.items()
        for step, score in points
    ]


def _routing_cells(found: Routing) -> list[dict[str, Any]]:
    shares = [dict(zip(found.encoders, row.round(4), strict=True)) for row in found.usage_CE]
    return [{"class": name, **row} for name, row in zip(found.classes, shares, strict=True)]


def _markdown(rows: Sequence[Row], runs: Sequence[Run]) -> str:
    lines = ["# Image tasks", ""]
    for data in dict.fromkeys(row.data for row in rows):
        of_data = [row for row in rows if row.data == data]
        lines += [f"## {data}", "", _settings([run for run in runs if run.data == data]), ""]
        others = list(dict.fromkeys(name for row in of_data for name in row.others))
        scores = [f"test {of_data[0].metric}", *others, "validation", f"{OURS} better by"]
        head = ["method", "seeds", *scores, "training s"]
        lines += [_cells(head), _cells(["---"] * len(head))]
        lines += [_markdown_row(row, others) for row in of_data]
        best = best_single(of_data, data)
        if best is not None:
            lines += ["", f"Best single encoder, by validation: {best.method}."]
        named = {row.ours for row in of_data if row.ours not in (None, OURS)}
        if named:
            lines += ["", f"Differences are those of {' or '.join(map(str, sorted(named)))}."]
        lines += [""]
    return "\n".join([*lines, FOOTER])


FOOTER = """Means over seeds with Student's t intervals of 95 %; a single seed has none. Differences
are taken seed by seed, and above 0 hub-pathway is better. Single models that come out of a run of
ensemble-i were trained in it side by side, so its time is that of all of them; ensemble-i:NAME
stopped together with the others.
"""


#: Settings that all runs of a data set may have in common, in words.
WORDS = {
    "hub.name": "hub {}",
    "data.image_size": "{} px",
    "data.limit": "limit {}",
    "train.epochs": "{} epochs",
    "train.batch_size": "batches of {}",
    "train.learning_rate": "learning rate {}",
    "train.encoder_lr_scale": "of encoders x {}",
}


def _settings(runs: Sequence[Run]) -> str:
    """Those that are the same in all; the others are in the table."""
    values = {key: {str(run.config[key]) for run in runs} for key in WORDS}
    words = [WORDS[key].format(*value) for key, value in values.items() if len(value) == 1]
    return f"All runs: {', '.join(words)}."


def _markdown_row(row: Row, others: Sequence[str]) -> str:
    given = {name: _percent(interval) for name, interval in row.others.items()}
    scores = [
        _percent(row.test),
        *(given.get(name, "") for name in others),
        _percent(row.validation),
    ]
    difference = "" if row.difference is None else _percent(row.difference)
    seeds = " ".join(map(str, row.seeds))
    return _cells([row.method, seeds, *scores, difference, f"{row.seconds:.0f}"])


def _cells(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


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
        **run.others,
        "seconds": run.seconds,
    }


def _row_cells(row: Row) -> dict[str, Any]:
    cells: dict[str, Any] = {"data": row.data, "method": row.method, "metric": row.metric}
    cells["seeds"] = " ".join(map(str, row.seeds))
    intervals = {"test": row.test, **row.others, "validation": row.validation}
    for name, interval in {**intervals, "difference": row.difference}.items():
        if interval is not None:
            cells |= {
                name: interval.mean,
                f"{name}_low": interval.low,
                f"{name}_high": interval.high,
            }
    return cells | {"compared_with": row.ours, "seconds": row.seconds}


def _write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, columns)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    cli.run(command, "python -m vision_tasks.report")
