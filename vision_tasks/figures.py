"""Figures of image tasks: scores, training curves, the exploration coefficient, routing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hubrl.plots import COLOURS, draw_legend, new_figure, save_figure
from vision_tasks.metrics import Interval, mean_over_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vision_tasks.results import Row

# Shape letters: C classes, E encoders.

#: Classes of a routing figure: more would be too small to read.
MAX_CLASSES = 40
#: Of lines, where there are more than colours.
DASHES = ("-", "--", ":")


def draw_scores(rows: Sequence[Row], file: Path) -> None:
    """Test score of each method with its interval: a panel for each data set."""
    names = list(dict.fromkeys(row.data for row in rows))
    n_methods = max(Counter(row.data for row in rows).values())
    figure, panels = _panels(len(names), height=1.0 + 0.3 * n_methods)
    for panel, name in zip(panels, names, strict=True):
        of_data = [row for row in rows if row.data == name][::-1]
        y = np.arange(len(of_data))
        means = np.array([row.test.mean for row in of_data])
        bars = _bars([row.test for row in of_data])
        panel.errorbar(means, y, xerr=bars, fmt="o", color=COLOURS[0], capsize=3)
        panel.set_yticks(y, [f"{row.method} ({len(row.seeds)})" for row in of_data])
        panel.set(xlabel=f"test {of_data[0].metric}", title=name)
        panel.grid(axis="x", alpha=0.3)
    note = "in brackets: seeds; bars: 95 % intervals over them"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=7)
    save_figure(figure, file)


def draw_curves(
    curves: Mapping[str, Mapping[str, Mapping[int, Sequence[tuple[int, float]]]]], file: Path
) -> None:
    """
    Validation score of each method while it is trained: mean over seeds, band from least to most.

    :param curves: by data set, method and seed: (step, score)
    """
    names = list(dict.fromkeys(method for methods in curves.values() for method in methods))
    figure, panels = _panels(len(curves), height=max(4.0, 0.7 + 0.2 * len(names)), margin=2.4)
    for panel, (data, methods) in zip(panels, curves.items(), strict=True):
        for method, by_seed in methods.items():
            seeds = [dict(points) for points in by_seed.values()]
            # Where training may stop early, seeds differ in length.
            steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
            scores = np.array([[seed[step] for step in steps] for seed in seeds])
            i = names.index(method)
            colour = COLOURS[i % len(COLOURS)]
            dash = DASHES[i // len(COLOURS) % len(DASHES)]
            look = {"color": colour, "linestyle": dash, "marker": "o", "ms": 2}
            panel.plot(steps, scores.mean(axis=0), label=method, **look)
            panel.fill_between(
                steps, scores.min(axis=0), scores.max(axis=0), color=colour, alpha=0.15, lw=0
            )
        panel.set(xlabel="steps", ylabel="validation score", title=data)
        panel.grid(alpha=0.3)
    draw_legend(figure, panels, handlelength=4, fontsize=8)
    save_figure(figure, file)


def draw_exploration(scores: Mapping[str, Mapping[float, Sequence[float]]], file: Path) -> None:
    """
    Test score over the weight of the exploration loss.

    :param scores: by data set and coefficient, for each seed
    """
    figure, panels = _panels(len(scores), height=3.5)
    for panel, (data, by_coef) in zip(panels, scores.items(), strict=True):
        coefs = sorted(by_coef)
        bands = [mean_over_seeds(by_coef[coef]) for coef in coefs]
        means = np.array([band.mean for band in bands])
        bars = _bars(bands)
        panel.errorbar(coefs, means, yerr=bars, fmt="o-", color=COLOURS[0], capsize=3)
        panel.set(xlabel="exploration coefficient", ylabel="test score", title=data)
        panel.grid(alpha=0.3)
    save_figure(figure, file)


def draw_routing(
    usage_CE: NDArray[np.float64],
    classes: Sequence[str],
    encoders: Sequence[str],
    examples: Sequence[NDArray[np.uint8]],
    file: Path,
) -> None:
    """
    Which encoders the images of each class activate, with an example image beside each.

    :param usage_CE: share of a class' images that activate an encoder; its rows sum to top_k
    :param classes: names
    :param encoders: names
    :param examples: an image (H, W, 3) of each class
    """
    n = min(len(classes), MAX_CLASSES)
    figure = new_figure(3.0 + 0.9 * len(encoders), 1.5 + 0.32 * n, layout=None)
    panel = figure.add_axes((0.42, 0.12, 0.5, 0.83))
    image = panel.imshow(usage_CE[:n], aspect="auto", cmap="viridis", vmin=0, vmax=1)
    panel.set_xticks(range(len(encoders)), encoders, rotation=30, ha="right", fontsize=8)
    panel.set_yticks(range(n), classes[:n], fontsize=8)
    panel.tick_params(axis="y", pad=22)
    bar = figure.colorbar(image, ax=panel, fraction=0.05, pad=0.02)
    bar.set_label("share of the class' images", fontsize=8)
    for i in range(n):
        small = panel.inset_axes((-0.075, 1 - (i + 0.95) / n, 0.06, 0.9 / n))
        small.imshow(examples[i])
        small.axis("off")
    save_figure(figure, file, bbox_inches="tight")


def _bars(intervals: Sequence[Interval]) -> NDArray[np.float64]:
    """Lengths below and above the means, (2, N); none where there is a single seed."""
    lows = [i.mean - (i.mean if i.low is None else i.low) for i in intervals]
    highs = [(i.mean if i.high is None else i.high) - i.mean for i in intervals]
    return np.array([lows, highs])


def _panels(n: int, height: float, margin: float = 0.0) -> tuple[Figure, NDArray[np.object_]]:
    figure = new_figure(6.4 * n + margin, height)
    return figure, figure.subplots(1, n, squeeze=False)[0]
