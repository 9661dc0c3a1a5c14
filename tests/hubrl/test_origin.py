"""Where a result comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hubrl import origin


def test_the_commit_is_that_of_this_code_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of a user's repository around an installation."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y"]
    inside = tmp_path / "venv" / "site-packages"
    for folder in ("hubrl", "agents", "envs", "configs"):
        (inside / folder).mkdir(parents=True)
    monkeypatch.setattr(origin, "REPOSITORY", inside.resolve())
    assert origin.commit() == "unknown"
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "hubrl").mkdir()
    (tmp_path / "hubrl" / "a.py").touch()
    subprocess.run([*git, "add", "hubrl"], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    assert origin.commit() == "unknown"
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, check=True).stdout
    monkeypatch.setattr(origin, "REPOSITORY", tmp_path.resolve())
    assert origin.commit() == head.decode()[:12]
    (tmp_path / "hubrl" / "a.py").write_text("changed")
    assert origin.commit() == head.decode()[:12] + "-dirty"
