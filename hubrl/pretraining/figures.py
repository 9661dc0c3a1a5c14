"""Pictures of pretraining, drawn with matplotlib: losses, or an agent's returns, over the steps."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from agents.runs import STEPS
from hubrl.plots import COLOURS, new_figure, save_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

#: Columns of ``losses.csv`` that are no losses: what they count, and shares with an axis of 0 to 1.
COUNTS = ("update", "frames")
SHARES = ("accuracy",)
RETURN = "rollout/ep_rew_mean"
LOG_RATIO = 10.0  # from the smallest loss to the largest: more is drawn on a logarithmic axis
N_DOTS = 40  # points of a line; more are drawn without dots


def draw_losses(table: Path, file: Path, title: str) -> None:
    """
    A line for each loss, over the steps of play; without rows in the table, no picture.

    :param table: ``losses.csv``
    :param file: the PNG that is written, or replaced: as a whole or not at all
    :param title: wrapped, if it is long
    """
    columns = _read(table)
    shares = {name: values for name, values in columns.items() if name in SHARES}
    losses = {name: v for name, v in columns.items() if name not in (*SHARES, *COUNTS)}
    if not losses:
        return
    heights = [3.0, 1.3] if shares else [3.0]
    figure, panels = _panels(heights, title)
    steps = columns["frames"]
    _lines(panels[0], steps, losses, COLOURS)
    _scale(panels[0], losses)
    if shares:
        _lines(panels[1], steps, shares, COLOURS[len(losses) :])
        panels[1].set(ylabel=" and ".join(shares), ylim=(0.0, 1.0))
    panels[-1].set_xlabel("agent steps of play, over all games")
    save_figure(figure, file)


def draw_returns(table: Path, file: Path, title: str) -> None:
    """
    An agent's mean return over its steps; no picture before the first game is over.

    :param table: ``progress.csv`` of its run
    :param file: the PNG that is written, or replaced: as a whole or not at all
    :param title: wrapped, if it is long
    """
    columns = _read(table)
    returns = columns.get(RETURN, np.empty(0))
    played = np.isfinite(returns)
    if not played.any():
        return
    figure, (panel,) = _panels([3.4], title)
    steps = columns[STEPS]
    _lines(panel, steps[played], {"return": returns[played]}, COLOURS)
    panel.set(xlabel="agent steps", ylabel="mean return of the last 100 games")
    save_figure(figure, file)


def _read(table: Path) -> dict[str, Floats]:
    """The columns of a table of numbers; NaN for an empty cell, nothing without a table."""
    if not table.exists():
        return {}
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = rows[0] if rows else ()
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in names}


def _panels(heights: list[float], title: str) -> tuple[Figure, list[Axes]]:
    """Panels below each other, over the same steps."""
    from matplotlib.ticker import EngFormatter

    figure = new_figure(7.2, sum(heights) + 1.0)
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
    panels: list[Axes] = list(grid[:, 0])
    panels[0].set_title("\n".join(textwrap.wrap(title, 64)))
    panels[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    for panel in panels:
        tidy(panel)
    return figure, panels


def _lines(
    panel: Axes, steps: Floats, lines: Mapping[str, Floats], colours: tuple[str, ...]
) -> None:
    """Each line's last value stands beside its name."""
    marker = "o" if len(steps) <= N_DOTS else ""
    for (name, values), colour in zip(lines.items(), colours, strict=False):
        label = f"{name}  {values[-1]:.3g}"
        panel.plot(steps, values, color=colour, lw=1.6, marker=marker, ms=3.5, label=label)
    panel.set_xlim(left=max(panel.get_xlim()[0], 0.0))
    panel.legend(
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        title="last value",
        alignment="left",
    )


def _scale(panel: Axes, losses: Mapping[str, Floats]) -> None:
    """A logarithmic axis where the losses are far apart, else a linear one from zero."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = np.concatenate(list(losses.values()))
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    if low <= 0 or high < LOG_RATIO * low:
        panel.set_ylabel("loss")
        if low >= 0:
            panel.set_ylim(bottom=0)
        return
    panel.set_ylabel("loss, logarithmic")
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())
