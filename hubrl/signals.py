"""``StopSignal``: SIGINT and SIGTERM are remembered, so that a run can save before it ends."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

#: To standard error: an update may take minutes.
NOTICE = b"stopping where the run can go on; a second signal stops it at once\n"


class StopSignal:
    """
    Remembers SIGINT and SIGTERM, and says so; a second one acts as if it was not caught.

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
        with contextlib.suppress(OSError):  # its terminal may be gone
            # print may be what the signal interrupts, and a progress bar has begun a line
            os.write(2, b"\n" + NOTICE if os.isatty(2) else NOTICE)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
