"""
A folder and a watch for one bad input at a time: what it may not do is noticed and stopped.

Python reports what touches files, sockets, processes and pickles to an audit hook, so nothing of
the product is replaced.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

#: Seconds of processor time for an input; others may use the machine, too.
MAX_SECONDS = 20.0
#: By how much an input may raise the process' peak memory, and how much it may ask for.
MAX_BYTES = 1024**3
MAX_ASKED = 4 * 1024**3
#: Environment variables that say where the product and its libraries keep what they fetch.
CACHES = ("HUBRL_CACHE", "TORCH_HOME")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
#: Audit events that change paths: how many of the first arguments are paths, and where the
#: descriptors of the folders begin that they may be relative to.
CHANGING = {
    "os.mkdir": (1, 2), "os.rename": (2, 2), "os.remove": (1, 1), "os.rmdir": (1, 1),
    "os.link": (2, 2), "os.symlink": (2, 2), "os.truncate": (1, 2), "os.chmod": (1, 2),
    "os.chown": (1, 3), "os.utime": (1, 3), "shutil.rmtree": (1, 2),
}  # fmt: skip
RUNNING = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.startfile", "pickle.find_class",
}  # fmt: skip
NETWORK = {"socket.__new__", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname"}


class BrokenPromiseError(AssertionError):
    """An input did what none may."""


class TooSlowError(BaseException):
    """No ``except Exception`` of the product may take it."""


class Sandbox:
    """
    A folder that an input is alone in.

    :param root: holds nothing but the folder ``inside``, to which the working folder is set
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.inside = self.root / "inside"
        self.inside.mkdir(parents=True)
        self.broken: list[str] = []
        self.may_connect = False
        self._n_outside = len(list(self.root.iterdir()))
        _add_hook()

    @contextlib.contextmanager
    def watch(self, *, may_connect: bool = False) -> Iterator[None]:
        """
        Inside, the input is tried.

        :param may_connect: sockets and processes are then stopped, but no broken promise
        :raises BrokenPromiseError: if it wrote outside its folder, opened a socket, started a
            process, unpickled, or took too long or too much memory
        """
        self.broken, self.may_connect = [], may_connect
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with _working_folder(self.inside), _limited(), _watched_by(self):
                yield
        except TooSlowError:
            raise BrokenPromiseError(f"it took over {MAX_SECONDS:g} s") from None
        finally:
            if self.broken:
                raise BrokenPromiseError(self.broken[0])
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
        if grown > MAX_BYTES:
            raise BrokenPromiseError(f"it took {grown:,} bytes of memory")
        if len(os.listdir(self.root)) != self._n_outside:
            raise BrokenPromiseError(f"it wrote outside: {os.listdir(self.root)}")

    def report(self, event: str, args: tuple[Any, ...]) -> None:
        """Called by the hook; raises for what is not allowed."""
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & WRITING:
                self._check_path(event, path)
        elif event in CHANGING:
            n_paths, first_folder = CHANGING[event]
            # Below a folder that is open already: its own opening was seen.
            if not any(type(fd) is int and fd != -1 for fd in args[first_folder:]):
                for path in args[:n_paths]:
                    self._check_path(event, path)
        elif event in RUNNING or event in NETWORK:
            self._stop(f"{event} {str(args)[:200]}", is_broken=not self.may_connect)

    def _check_path(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            return
        found = os.path.realpath(os.fsdecode(path))
        if found != os.devnull and not f"{found}/".startswith(f"{self.inside}/"):
            self._stop(f"{event} {found}")

    def _stop(self, what: str, *, is_broken: bool = True) -> NoReturn:
        if is_broken:
            self.broken.append(what)
        raise PermissionError(f"stopped by the watch: {what}")


_watching: Sandbox | None = None
_has_hook = False


def _add_hook() -> None:
    global _has_hook
    if not _has_hook:
        _has_hook = True
        sys.addaudithook(_hook)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _watching is not None and (
        event == "open" or event in CHANGING or event in RUNNING or event in NETWORK
    ):
        _watching.report(event, args)


@contextlib.contextmanager
def _watched_by(sandbox: Sandbox) -> Iterator[None]:
    global _watching
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    _watching = sandbox
    try:
        yield
    finally:
        _watching = None
        sys.dont_write_bytecode = writes_bytecode


@contextlib.contextmanager
def _working_folder(folder: Path) -> Iterator[None]:
    before, caches = os.getcwd(), {name: str(folder / "cache") for name in CACHES}
    os.chdir(folder)
    try:
        with (
            mock.patch.dict(os.environ, caches),
            mock.patch.object(tempfile, "tempdir", str(folder)),
        ):
            yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Limits of processor time and of memory that may be asked for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MAX_ASKED
    before = signal.signal(signal.SIGPROF, _raise_too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def _raise_too_slow(*_: object) -> NoReturn:
    raise TooSlowError
