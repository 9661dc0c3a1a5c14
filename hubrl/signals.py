"""``StopSignal``: SIGINT and SIGTERM are remembered, so that a run can save before it ends."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class StopSignal:
    """
    Remembers SIGINT and SIGTERM; a second one acts as if it was not caught.

    ``number`` is None, or the signal's number.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals inside."""
        signals = (signal.SIGINT, signal.SIGTERM)
        self._previous = {number: signal.signal(number, self._remember) for number in signals}
        try:
            yield
        finally:
            self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
