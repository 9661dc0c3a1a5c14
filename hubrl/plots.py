"""What all figures have in common: how they begin, look and are saved; matplotlib if installed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with all kinds of colour vision; black is the control's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
DPI = 130


def new_figure(
    width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    """
    Without pyplot, which wants a screen.

    :param width: in inches
    :param height: in inches
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def tidy(panel: Axes) -> None:
    """A light grid behind the data, and two sides of the frame."""
    panel.grid(color="#dddddd", lw=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, file: Path, **look: Any) -> None:
    """
    As PNG; an older file is replaced as a whole or not at all.

    :param look: as of ``Figure.savefig``
    """
    temporary = file.with_name(f".{file.name}.new")
    # No software version inside: the same numbers give the same file.
    figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None}, **look)
    os.replace(temporary, file)


def draw_legend(figure: Figure, panels: Iterable[Axes], **look: Any) -> None:
    """
    One legend, on the right, for all panels; what has one name in several is in it once.

    :param look: as of ``Figure.legend``
    """
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    names = list(handles)
    figure.legend(list(handles.values()), names, loc="outside right upper", frameon=False, **look)


def import_matplotlib() -> None:
    """
    :raises ValueError: if it is not installed
    """
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError:
        raise ValueError("figures need matplotlib: pip install 'hubrl[plot]'") from None
