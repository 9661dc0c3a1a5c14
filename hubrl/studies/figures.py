"""Figures of a study, drawn with matplotlib, which is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hubrl.plots import COLOURS, draw_legend, new_figure, save_figure, tidy
from hubrl.studies import statistics
from hubrl.studies.config import StudyConfig
from hubrl.studies.results import ALL, Axis, Row, Table, in_units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":", "-.")
CONTROL_COLOUR = "#000000"
N_COLUMNS = 3
#: For curves: a bootstrap of every point.
N_RESAMPLES = 2000
INTERVALS = "bars: 95 % bootstrap intervals\narrow: without end\nhollow, no bar: 1 seed, or unknown"


def draw(study: StudyConfig, tables: Mapping[Axis, Table], folder: Path) -> None:
    """
    Write ``NAME_steps.png`` and ``NAME_seconds.png`` for each name in ``FIGURES``.

    :param folder: for the results; it exists
    """
    for axis, table in tables.items():
        for name, (_, make) in FIGURES.items():
            save_figure(make(study, table), folder / f"{name}_{axis}.png")


def draw_curves(study: StudyConfig, table: Table) -> Figure:
    """The return of each variant while learning, with its interval: a panel for each game."""
    figure, panels = _panels(study)
    for game, panel in panels.items():
        for variant in table.variants(game):
            look = _look(study, variant)
            x, band = _curve(study, table, game, variant)
            panel.plot(x, band.value, label=_label(table, variant), **look)
            if band.low is not None and band.high is not None:
                panel.fill_between(x, band.low, band.high, color=look["color"], alpha=0.15, lw=0)
        panel.set(xlabel=_time_label(table, game), ylabel="return of whole games, unclipped")
        panel.set_xlim(left=0)
        panel.xaxis.set_major_formatter(_thousands)
        if game == ALL:
            panel.set_ylabel(f"return, share of {study.control}'s final one")
    _legend(figure, panels, "bands: 95 % bootstrap intervals\nno band: 1 seed")
    return figure


def draw_bars(study: StudyConfig, table: Table) -> Figure:
    """Area under the curve and final return over the control's, with intervals."""
    figure, panels = _panels(study)
    for game, panel in panels.items():
        variants = [v for v in table.variants(game) if v != study.control]
        for offset, metric, marker in ((-0.12, "area_ratio", "o"), (0.12, "final_ratio", "s")):
            rows = [table.row(game, variant, metric) for variant in variants]
            colours = [_look(study, variant)["color"] for variant in variants]
            _intervals(panel, rows, colours, offset, marker, metric.replace("_ratio", ""))
        panel.axvline(1.0, color=CONTROL_COLOUR, lw=1, ls="--")
        panel.set(xlabel=f"ratio to {study.control}")
        _names(panel, table, variants)
    _legend(figure, panels, INTERVALS)
    return figure


def draw_improvement(study: StudyConfig, table: Table) -> Figure:
    """Probability that a random seed's area is above a random one of the control."""
    figure, panels = _panels(study)
    for game, panel in panels.items():
        variants = [v for v in table.variants(game) if v != study.control]
        rows = [table.row(game, variant, "probability_of_improvement") for variant in variants]
        colours = [_look(study, variant)["color"] for variant in variants]
        _intervals(panel, rows, colours, 0.0, "o", "area")
        panel.axvline(0.5, color=CONTROL_COLOUR, lw=1, ls="--")
        panel.set(xlabel=f"P(area above {study.control}'s)")
        panel.set_xlim(-0.03, 1.03)
        _names(panel, table, variants)
    _legend(figure, panels, INTERVALS)
    return figure


def draw_thresholds(study: StudyConfig, table: Table) -> Figure:
    """Median time to each threshold; a line ends where half of the runs or more never came."""
    figure, panels = _panels(study)
    levels = study.metric.thresholds
    for game, panel in panels.items():
        for variant in table.variants(game):
            rows = [table.row(game, variant, f"time_to_{level:g}") for level in levels]
            times = [row.value if row and row.value is not None else np.inf for row in rows]
            times = [time if np.isfinite(time) else np.nan for time in times]
            look = _look(study, variant)
            panel.plot(levels, times, marker="o", ms=4, label=_label(table, variant), **look)
        panel.set(
            xlabel=f"threshold, share of {study.control}'s final return",
            ylabel=f"{_time_label(table, game)} to reach it, median",
        )
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(_thousands)
    _legend(figure, panels, "a line ends where half of\nthe runs or more never came")
    return figure


#: By file name: title, and what draws it.
FIGURES: dict[str, tuple[str, Callable[[StudyConfig, Table], Figure]]] = {
    "curves": ("Learning curves", draw_curves),
    "ratios": ("Area and final return over the control's", draw_bars),
    "improvement": ("Probability of improvement", draw_improvement),
    "thresholds": ("Time to threshold", draw_thresholds),
}


def _curve(
    study: StudyConfig, table: Table, game: str, variant: str
) -> tuple[statistics.Floats, statistics.Band]:
    """Mean over seeds; over all games, interquartile mean of shares of the control's final."""
    if game != ALL:
        curve = [table.cells[variant, game].curve_PS]
        return table.grids[game], statistics.band(statistics.mean, curve, n_resamples=N_RESAMPLES)
    curves = in_units(study, table, variant, "curve_PS", "final_S")
    x = next(grid / grid[-1] for grid in table.grids.values())
    return x, statistics.band(statistics.interquartile_mean, curves, n_resamples=N_RESAMPLES)


def _panels(study: StudyConfig) -> tuple[Figure, dict[str, Axes]]:
    """A panel for each game, and of several games one for all."""
    titles = {game: game for game in study.games}
    if len(titles) > 1:
        titles = {ALL: f"all {len(titles)} games", **titles}
    n_columns = min(len(titles), N_COLUMNS)
    n_rows = -(-len(titles) // n_columns)
    height = max(3.6, 0.32 * len(study.variants) + 1.2)
    figure = new_figure(4.6 * n_columns + 2.4, height * n_rows)
    panels = {game: figure.add_subplot(n_rows, n_columns, i + 1) for i, game in enumerate(titles)}
    for game, panel in panels.items():
        panel.set_title(titles[game])
        tidy(panel)
    return figure, panels


def _look(study: StudyConfig, variant: str) -> dict[str, Any]:
    """The same colour and dashes for a variant in all figures."""
    if variant == study.control:
        return {"color": CONTROL_COLOUR, "ls": "-", "lw": 2.0}
    i = [name for name in study.variants if name != study.control].index(variant)
    dashes = DASHES[i // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[i % len(COLOURS)], "ls": dashes, "lw": 1.6}


def _label(table: Table, variant: str) -> str:
    """The same in all panels, with the number of seeds."""
    counts = {len(cell.seeds) for (name, _), cell in table.cells.items() if name == variant}
    seeds = f"{min(counts)}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    return f"{variant} ({seeds} seed{'' if counts == {1} else 's'})"


def _time_label(table: Table, game: str) -> str:
    if game == ALL:
        return "share of the run"
    return {"steps": "agent steps", "seconds": "training time (s)"}[table.axis]


def _thousands(value: float, _: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _intervals(
    panel: Axes,
    rows: Sequence[Row | None],
    colours: Sequence[str],
    offset: float,
    marker: str,
    label: str,
) -> None:
    """One line for each variant, with an arrow where it has no end; a hollow marker without any."""
    for y, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        if row is None or row.value is None:
            continue
        face = "white"
        # NaN where a resample has a control and a variant that never scored.
        if row.low is not None and row.high is not None and not np.isnan([row.low, row.high]).any():
            ends = [row.low, row.high]
            if not np.isfinite(row.high):
                ends[1] = row.value + max(row.value - row.low, 0.2 * abs(row.value))
                panel.plot(ends[1], y + offset, ">", color=colour, ms=7)
            panel.plot(ends, [y + offset] * 2, color=colour, lw=2.5)
            face = colour
        panel.plot(row.value, y + offset, marker, color=colour, mfc=face, ms=7, mew=1.5)
    panel.plot([], [], marker, color="#555555", label=label)


def _names(panel: Axes, table: Table, variants: Sequence[str]) -> None:
    panel.set_yticks(range(len(variants)), [_label(table, variant) for variant in variants])
    panel.set_ylim(max(len(variants), 1) - 0.5, -0.5)


def _legend(figure: Figure, panels: Mapping[str, Axes], title: str) -> None:
    """Its title says how to read the figure."""
    draw_legend(figure, panels.values(), title=title, alignment="left")
