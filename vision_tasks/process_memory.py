"""What Linux tells of a process' memory."""

from __future__ import annotations

from pathlib import Path

MB = 1e6


def read_memory(pid: int | None = None) -> dict[str, int]:
    """The lines of a process' ``status`` that are memory, in bytes; of this one without ``pid``."""
    lines = Path("/proc", str(pid or "self"), "status").read_text().splitlines()
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(value) for name, value, _ in pairs}
