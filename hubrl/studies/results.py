"""Results of a study: the runs' games measured at equal steps and equal seconds, as tables."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from agents.runs import EPISODES_FILE, PROGRESS_FILE, SECONDS, STEPS
from hubrl.run_folder import cell_number, read_rows
from hubrl.studies import statistics
from hubrl.studies.config import Run, StudyConfig
from hubrl.studies.statistics import Estimate, Floats, Strata

Axis = Literal["steps", "seconds"]
#: Of each axis: its name for people.
AXES: dict[Axis, str] = {"steps": "agent steps", "seconds": "seconds"}
#: In the place of a game: over all games, each measured in the control's units.
ALL = "all"
CURVES_FILE, SUMMARY_FILE = "curves.csv", "summary.csv"


class Games(NamedTuple):
    """The whole games of a run, in the order of their ends."""

    steps: Floats
    """When each ended, in agent steps."""
    seconds: Floats
    """The same in seconds since the run's start."""
    returns: Floats
    """Unclipped return of each."""
    n_steps: float
    """Agent steps of the whole run."""
    n_seconds: float
    """Seconds of it."""


class Cell(NamedTuple):
    """What one variant did on one game. S seeds, P points, T thresholds."""

    seeds: tuple[int, ...]
    curve_PS: Floats
    """Learning curves."""
    area_S: Floats
    """Area under each curve over its length: the mean return while learning."""
    start_S: Floats
    """Return at the start; NaN: no game ended within it."""
    final_S: Floats
    """The last point of each curve."""
    times_TS: Floats
    """When each curve reached each threshold; infinity: never."""


class Row(NamedTuple):
    """A line of ``summary.csv``."""

    axis: Axis
    game: str
    variant: str
    metric: str
    unit: str
    value: float | None
    low: float | None
    high: float | None
    n_runs: int


class Table(NamedTuple):
    """All runs measured along one axis."""

    axis: Axis
    grids: dict[str, Floats]
    """Of each game: where the points of its curves lie."""
    cells: dict[tuple[str, str], Cell]
    """By variant and game."""
    rows: list[Row]

    def row(self, game: str, variant: str, metric: str) -> Row | None:
        """A line of the summary, if there is one."""
        wanted = (game, variant, metric)
        return next((r for r in self.rows if (r.game, r.variant, r.metric) == wanted), None)

    def variants(self, game: str) -> list[str]:
        """Those that have runs; for all games, those that have runs on each."""
        names = dict.fromkeys(variant for variant, _ in self.cells)
        games = list(self.grids) if game == ALL else [game]
        return [name for name in names if all((name, g) in self.cells for g in games)]


class Results(NamedTuple):
    """What a study found."""

    tables: dict[Axis, Table]
    """By axis: steps, and seconds where runs can be measured at equal seconds."""
    no_seconds: str | None
    """Why they can't."""


def collect(study: StudyConfig, done: Sequence[Run], out: Path, folder: Path) -> Results:
    """
    Measure the complete runs and write ``curves.csv`` and ``summary.csv``.

    :param done: the complete runs
    :param out: where the runs are
    :param folder: for the results
    :raises ValueError: if a run has no games, or a game no run of the control, or a run has none
        within the study's steps
    """
    for game in study.games:
        if not any(run.variant == study.control and run.game == game for run in done):
            raise ValueError(
                f"the control {study.control!r} has no complete run of {game} in {out}"
            )
    games = {run: read_games(out / "runs" / run.path) for run in done}
    tables: dict[Axis, Table] = {"steps": measure(study, games, "steps")}
    no_seconds = None
    try:
        tables["seconds"] = measure(study, games, "seconds")
    except ValueError as error:
        no_seconds = str(error)
    folder.mkdir(parents=True, exist_ok=True)
    _write(
        folder / CURVES_FILE, ["axis", "game", "variant", "seed", "x", "return"], _points(tables)
    )
    rows = (row for table in tables.values() for row in table.rows)
    _write(folder / SUMMARY_FILE, Row._fields, (map(_cell_text, row) for row in rows))
    return Results(tables, no_seconds)


def read_games(folder: Path) -> Games:
    """
    The games of a run, out of ``episodes.csv``; its length in seconds is in ``progress.csv``.

    :raises ValueError: if there is none, or none with a game, or something else in it than numbers
    """
    file = folder / EPISODES_FILE
    if not file.is_file():
        raise ValueError(f"the run {folder} has no {EPISODES_FILE}; delete it to train it again")
    rows = read_rows(file)
    if not rows:
        raise ValueError(f"the run {folder} has no game in {EPISODES_FILE}: train it longer")
    steps, seconds, returns = (
        np.array([cell_number(row, column, file) for row in rows])
        for column in ("timesteps", "seconds", "return")
    )
    n_steps, n_seconds = _end(folder)
    ends = max(float(steps[-1]), n_steps), max(float(seconds[-1]), n_seconds)
    return Games(steps, seconds, returns, *ends)


def _end(folder: Path) -> tuple[float, float]:
    """Steps and seconds of ``progress.csv``'s last row; 0 if it is older than the latter."""
    file = folder / PROGRESS_FILE
    rows = [row for row in read_rows(file) if row.get(SECONDS)]
    if not rows:
        return 0.0, 0.0
    return cell_number(rows[-1], STEPS, file), cell_number(rows[-1], SECONDS, file)


def measure(study: StudyConfig, episodes: Mapping[Run, Games], axis: Axis) -> Table:
    """
    Measure runs along an axis.

    At equal seconds a game's curves end where its fastest run ended: all had that long.

    :raises ValueError: if the control's return is not above a game's floor, or a run has no game
        within the axis
    """
    grids, cells = {}, {}
    for game in study.games:
        runs = {
            run: _within(games, study.n_timesteps)
            for run, games in episodes.items()
            if run.game == game
        }
        end = float(study.n_timesteps)
        if axis == "seconds":
            end = min(games.n_seconds for games in runs.values())
        grids[game] = np.linspace(0, end, study.metric.n_points + 1)[1:]
        curves = _curves(study, runs, axis, grids[game])
        levels = _thresholds(study, game, curves[study.control].curve_PS)
        for variant, mine in curves.items():
            cells[variant, game] = _cell(grids[game], mine, levels)
    table = Table(axis, grids, cells, [])
    table.rows.extend(_rows(study, table))
    return table


def _within(games: Games, n_timesteps: int) -> Games:
    """A run that was trained for longer, cut there: the same games along both axes."""
    n = int(np.searchsorted(games.steps, n_timesteps, side="right"))
    if n == 0 or games.n_steps <= n_timesteps:
        return games
    steps, seconds = [*games.steps, games.n_steps], [*games.seconds, games.n_seconds]
    n_seconds = float(np.interp(n_timesteps, steps, seconds))
    return Games(games.steps[:n], games.seconds[:n], games.returns[:n], n_timesteps, n_seconds)


class _Curves(NamedTuple):
    """Of one variant on one game."""

    seeds: tuple[int, ...]
    curve_PS: Floats
    start_S: Floats
    first_end_S: Floats
    """When the first game of each run ended."""


def _curves(
    study: StudyConfig, runs: Mapping[Run, Games], axis: Axis, grid: Floats
) -> dict[str, _Curves]:
    curves = {}
    for variant in study.variants:
        mine = {run: games for run, games in runs.items() if run.variant == variant}
        if mine:
            found = [_curve(study, run, games, axis, grid) for run, games in mine.items()]
            points, starts, first_ends = zip(*found, strict=True)
            seeds = tuple(run.seed for run in mine)
            curves[variant] = _Curves(
                seeds, np.stack(points, 1), np.array(starts), np.array(first_ends)
            )
    return curves


def _curve(
    study: StudyConfig, run: Run, games: Games, axis: Axis, grid: Floats
) -> tuple[Floats, float, float]:
    """Learning curve, return at the start, end of the first game."""
    x, end = getattr(games, axis), grid[-1]
    if x[0] > end:
        raise ValueError(
            f"{run}: its first game ended after {x[0]:,.0f} {AXES[axis]}, but its curve has "
            f"{end:,.0f}: train all runs longer"
        )
    curve = statistics.learning_curve(x, games.returns, grid, study.metric.window * end)
    start = study.metric.jump_start * end
    if x[0] > start:
        return curve, math.nan, x[0]
    starts = statistics.learning_curve(x, games.returns, [start], start)
    return curve, float(starts[0]), x[0]


def _thresholds(study: StudyConfig, game: str, control_PS: Floats) -> list[float]:
    """Returns that are shares of the control's final return, above the floor."""
    floor = study.metric.floors.get(game, 0.0)
    for name, value in (("final", control_PS[-1].mean()), ("mean", control_PS.mean())):
        if value <= floor:
            raise ValueError(
                f"metric.floors: the control's {name} return of {game} is {value:g}, not above the "
                f"floor {floor:g}; give one below it, such as random play's"
            )
    return [
        floor + share * (float(control_PS[-1].mean()) - floor) for share in study.metric.thresholds
    ]


def _cell(grid: Floats, curves: _Curves, levels: Sequence[float]) -> Cell:
    seeds, curve_PS, start_S, first_end_S = curves
    times = [
        [
            statistics.time_to_threshold(grid, curve, level, first_end)
            for curve, first_end in zip(curve_PS.T, first_end_S, strict=True)
        ]
        for level in levels
    ]
    return Cell(seeds, curve_PS, curve_PS.mean(axis=0), start_S, curve_PS[-1], np.array(times))


def _rows(study: StudyConfig, table: Table) -> Iterator[Row]:
    for game in study.games:
        for variant in table.variants(game):
            cell, control = table.cells[variant, game], table.cells[study.control, game]
            found = _game_estimates(study, table.axis, game, variant, cell, control)
            yield from _as_rows(table.axis, game, variant, len(cell.seeds), found)
    for variant in table.variants(ALL):
        cells = [table.cells[variant, game] for game in study.games]
        found = _all_estimates(study, table, variant)
        yield from _as_rows(table.axis, ALL, variant, sum(len(c.seeds) for c in cells), found)


Estimates = Iterator[tuple[str, str, Estimate | None]]


def _game_estimates(
    study: StudyConfig, axis: Axis, game: str, variant: str, cell: Cell, control: Cell
) -> Estimates:
    """Of one game, in its own returns: metric, unit, number."""
    floor = study.metric.floors.get(game, 0.0)
    estimate = statistics.estimate
    for name, scores_S in (("area", cell.area_S), ("final", cell.final_S), ("start", cell.start_S)):
        yield name, "return", estimate(statistics.mean, [scores_S])
    for level, times_S in zip(study.metric.thresholds, cell.times_TS, strict=True):
        yield f"time_to_{level:g}", AXES[axis], estimate(statistics.median, [times_S])
    if variant == study.control:
        return
    areas = [cell.area_S - floor], [control.area_S - floor]
    finals = [cell.final_S - floor], [control.final_S - floor]
    yield "area_ratio", "1", estimate(statistics.mean_ratio, *areas)
    yield "final_ratio", "1", estimate(statistics.mean_ratio, *finals)
    yield "jump_start", "return", estimate(statistics.difference, [cell.start_S], [control.start_S])
    probability = estimate(statistics.probability_of_improvement, *areas)
    yield "probability_of_improvement", "1", probability
    difference = estimate(statistics.difference, *areas)
    yield "area_difference", "return", difference
    is_worse = None if difference.high is None else Estimate(float(difference.high < 0))
    yield "negative_transfer", "0 or 1", is_worse


def _all_estimates(study: StudyConfig, table: Table, variant: str) -> Estimates:
    """
    Over all games: interquartile means of returns in the control's units.

    An area counts in the control's mean area on that game, a final return and a start in its mean
    final return, a time in the length of the run.
    """
    estimate, iqm = statistics.estimate, statistics.interquartile_mean
    units = {"area": ("area_S", "area_S"), "final": ("final_S", "final_S")}
    units["start"] = ("start_S", "final_S")
    mine = {name: in_units(study, table, variant, *unit) for name, unit in units.items()}
    for name, scores in mine.items():
        yield name, "control", estimate(iqm, scores)
    cells = [table.cells[variant, game] for game in study.games]
    ends = [table.grids[game][-1] for game in study.games]
    for i, level in enumerate(study.metric.thresholds):
        times = [c.times_TS[i] / end for c, end in zip(cells, ends, strict=True)]
        yield f"time_to_{level:g}", "run", estimate(statistics.median, times)
    if variant == study.control:
        return
    control = {name: in_units(study, table, study.control, *unit) for name, unit in units.items()}
    for name in ("area", "final"):
        quotient = estimate(statistics.interquartile_ratio, mine[name], control[name])
        yield f"{name}_ratio", "1", quotient
    difference = estimate(statistics.difference, mine["start"], control["start"])
    yield "jump_start", "control", difference
    probability = statistics.probability_of_improvement
    yield "probability_of_improvement", "1", estimate(probability, mine["area"], control["area"])


def in_units(study: StudyConfig, table: Table, variant: str, field: str, unit: str) -> Strata:
    """
    A field of a variant's cells, game by game, in units of the control.

    :param unit: the field whose mean, for the control, counts as 1; the game's floor counts as 0
    """
    strata = []
    for game in study.games:
        floor = study.metric.floors.get(game, 0.0)
        one = getattr(table.cells[study.control, game], unit).mean()
        scores = getattr(table.cells[variant, game], field)
        strata.append((scores - floor) / (one - floor))
    return strata


def _as_rows(axis: Axis, game: str, variant: str, n_runs: int, found: Estimates) -> Iterator[Row]:
    for metric, unit, number in found:
        value, low, high = number or (None, None, None)
        if value is not None and math.isnan(value):
            value = low = high = None
        yield Row(axis, game, variant, metric, unit, value, low, high, n_runs)


def _points(tables: Mapping[Axis, Table]) -> Iterator[Sequence[Any]]:
    """Lines of ``curves.csv``."""
    for axis, table in tables.items():
        for (variant, game), cell in table.cells.items():
            for seed, curve in zip(cell.seeds, cell.curve_PS.T, strict=True):
                for x, value in zip(table.grids[game], curve, strict=True):
                    yield axis, game, variant, seed, f"{x:.6g}", f"{value:.6g}"


def _write(file: Path, header: Sequence[str], rows: Iterator[Any]) -> None:
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _cell_text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
