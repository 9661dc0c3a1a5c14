"""Bad inputs of each kind, a few at each run; ``make fuzz`` tries more, guided by coverage."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import inputs, mutations, sandbox, valid
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

N_EXAMPLES = 8
#: Kinds that ``make fuzz`` alone tries: each input is a training.
SLOW = ("agent_run",)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sandbox")
    inputs.use_sandbox(root)
    return root


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch's reader, at what it refuses
@pytest.mark.parametrize("kind", [kind for kind in inputs.KINDS if kind not in SLOW])
@settings(
    max_examples=N_EXAMPLES,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_it_is_taken_or_refused_in_one_line(kind: str, data: st.DataObject) -> None:
    document = data.draw(st.sampled_from(valid.SEEDS[kind]()))
    random = data.draw(st.randoms(use_true_random=False))
    try:
        document = mutations.mutated(kind, document, random)
    except ValueError:  # no document, but bytes
        place, end = sorted(random.randrange(len(document)) for _ in range(2))
        document = document[:place] + random.randbytes(4) + document[end:]
    inputs.KINDS[kind](document)


@pytest.mark.parametrize("kind", inputs.KINDS)
def test_valid_ones_are_taken(kind: str) -> None:
    """Or the fuzzers would try nothing but the first check of each reader."""
    assert any(inputs.KINDS[kind](data) for data in valid.SEEDS[kind]()[:4])


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda: Path("../x").write_text(""), "open .*/x"),
        (lambda: os.mkdir("../x"), "os.mkdir"),
        (lambda: os.rename("here", "../x"), "os.rename"),
        (lambda: os.symlink("here", "../x"), "os.symlink"),
        (lambda: socket.socket(), "socket.__new__"),
        (lambda: subprocess.run(["true"], check=False), "subprocess.Popen"),
        (lambda: os.system("true"), "os.system"),
        (
            lambda: pickle.loads(pickle.dumps(valid.Evil())),
            r"pickle.find_class \('builtins', 'exec'\)",
        ),
    ],
)
def test_the_watch_notices(act: Callable[[], object], what: str, tmp_path: Path) -> None:
    watch = sandbox.Sandbox(tmp_path / "own")
    (watch.inside / "here").touch()
    # As a reader might that takes what it can't explain for bad input.
    hiding = contextlib.suppress(Exception)
    with pytest.raises(sandbox.BrokenPromiseError, match=what), watch.watch(), hiding:
        act()
    assert [path.name for path in watch.root.iterdir()] == ["inside"]


def test_the_watch_notices_time_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = sandbox.Sandbox(tmp_path / "own")
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)
    with pytest.raises(sandbox.BrokenPromiseError, match=r"it took over 0\.05 s"), watch.watch():
        all(iter(lambda: True, False))
    monkeypatch.setattr(sandbox, "MAX_ASKED", 2**30)
    with pytest.raises(MemoryError), watch.watch():
        bytearray(2**31)
    assert Path.cwd() != watch.inside
