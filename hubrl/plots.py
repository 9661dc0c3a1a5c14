"""What all figures have in common: colours, resolution, and matplotlib where it is installed."""

from __future__ import annotations

import importlib

# Okabe and Ito's colours, told apart with all kinds of colour vision; black is the control's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
DPI = 130


def import_matplotlib() -> None:
    """
    :raises ValueError: if it is not installed
    """
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError:
        raise ValueError("figures need matplotlib: pip install 'hubrl[plot]'") from None
