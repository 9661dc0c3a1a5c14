"""What all figures have in common: colours, resolution, and matplotlib where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with all kinds of colour vision; black is the control's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
DPI = 130


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
