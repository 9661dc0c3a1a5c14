"""Engines of a study: trainings as processes on this machine, or as tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agents.config import HubSection, load_config
from agents.runs import checkpoint_dir
from hubrl.files import reason
from hubrl.origin import commit, same_code
from hubrl.run_folder import CONFIG_FILE
from hubrl.signals import StopSignal
from hubrl.specs import load_hub
from hubrl.state_folder import has_state
from hubrl.studies.config import Run

NICENESS = 10
POLL_SECONDS = 0.2


class Job(NamedTuple):
    """
    A run of a study and its files.

    :param out: of the study; absolute, for a Ray task has a folder of its own
    """

    run: Run
    out: Path

    @property
    def folder(self) -> Path:
        """Of the run; it may hold a checkpoint."""
        return self.out / "runs" / self.run.path

    @property
    def config(self) -> Path:
        """Configuration that the run starts from."""
        return self._file(".yaml")

    @property
    def log(self) -> Path:
        """What the process prints is added to it."""
        return self._file(".txt")

    @property
    def facts(self) -> Path:
        """What the run's own folder doesn't tell: commit and weights."""
        return self._file(".json")

    def _file(self, suffix: str) -> Path:
        return (self.out / "jobs" / self.run.path).with_suffix(suffix)


#: Told of each job that ends, with its exit code.
OnEnd = Callable[[Job, int], None]


def n_cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores(n_parallel: int | None) -> tuple[int, int]:
    """
    How many processes run at a time, and how many threads each may take.

    :param n_parallel: processes, if the user said so
    """
    # OpenMP allows a list, one number for each level of nesting.
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wanted.isdecimal() and int(wanted) > 0:
        return n_parallel or max(1, n_cores() // int(wanted)), int(wanted)
    n_parallel = n_parallel or n_cores()
    return n_parallel, max(1, n_cores() // n_parallel)


def run_local(
    jobs: Sequence[Job], n_parallel: int | None, stop: StopSignal, on_end: OnEnd, lock: int
) -> None:
    """
    Run jobs as processes of this machine, in their order.

    :param n_parallel: at a time; default: as many as share out the cores. Each has its share of the
        cores, unless ``OMP_NUM_THREADS`` says how many threads it takes
    :param stop: once it has a number, processes are asked to save a checkpoint and end
    :param lock: a file descriptor that each process holds open until it ends
    """
    waiting, running = deque(jobs), dict[Job, subprocess.Popen[bytes]]()
    n_parallel, n_threads = share_cores(n_parallel)
    asked = False
    try:
        with stop.caught():
            while running or (waiting and stop.number is None):
                while waiting and len(running) < n_parallel and stop.number is None:
                    job = waiting.popleft()
                    try:
                        running[job] = start(job, n_threads, (lock,))
                    except (OSError, ValueError) as error:
                        on_end(job, _not_started(job, error))
                if stop.number is not None and not asked:
                    print(f"stopping: {len(running)} trainings save a checkpoint", flush=True)
                    _terminate(running)
                    asked = True
                for job in [job for job, process in running.items() if process.poll() is not None]:
                    on_end(job, running.pop(job).returncode)
                time.sleep(POLL_SECONDS)
    finally:
        if not asked:  # a second signal ends a training without a checkpoint
            _terminate(running)


def run_ray(jobs: Sequence[Job], stop: StopSignal, on_end: OnEnd) -> None:
    """
    Run jobs as tasks of a Ray cluster whose machines share the folders; one core for each, and a
    GPU, where the cluster has any, but for ``train.device: cpu``: Ray hides GPUs from tasks that
    don't ask for them.

    The cluster is that of ``RAY_ADDRESS``; without it Ray starts one on this machine.

    :param stop: once it has a number, tasks are cancelled: they save a checkpoint and end
    :raises ValueError: if Ray is not installed
    """
    ray = import_ray()
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, runtime_env={"env_vars": same_code()})
    task = ray.remote(num_cpus=1, max_retries=2)(run_job)
    has_gpus = ray.cluster_resources().get("GPU", 0) >= 1
    # Ray sets handlers of its own as it starts.
    with stop.caught():
        pending = {
            task.options(num_gpus=int(has_gpus and _device(job) != "cpu")).remote(job): job
            for job in jobs
        }
        _await(ray, pending, stop, on_end)
    if started_here:
        ray.shutdown()


def import_ray() -> Any:
    """
    :raises ValueError: if Ray is not installed
    """
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError:
        raise ValueError("--engine ray needs Ray: pip install ray") from None


def run_job(job: Job) -> int:
    """Run one job to its end; an interrupt, by which Ray cancels, becomes a checkpoint."""
    try:
        process = start(job, n_threads=1)
    except (OSError, ValueError) as error:
        return _not_started(job, error)
    try:
        # Ray interrupts by a flag, which a blocking wait would not notice.
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        process.terminate()
    return process.wait()


def start(job: Job, n_threads: int, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
    """
    Start a job's process, at low priority, from its checkpoint if there is one.

    It has a session of its own: Ctrl-C would reach it twice otherwise, and a second signal ends a
    training without a checkpoint.
    """
    if can_resume(job.folder):
        options = ["--resume", str(job.folder)]
    else:
        # A run that was stopped before its first checkpoint has nothing to go on from.
        if (job.folder / CONFIG_FILE).exists():
            shutil.rmtree(job.folder)
        options = ["--config", str(job.config), "--run-dir", str(job.folder)]
        facts = {"commit": commit(), "weights": weights(load_config(job.config).hub)}
        new = job.facts.with_suffix(".new")
        new.write_text(json.dumps(facts) + "\n")
        new.replace(job.facts)
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            ["nice", "-n", str(NICENESS), sys.executable, "-m", "hubrl.train", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(n_threads)} | same_code(),
            start_new_session=True,
            pass_fds=pass_fds,
        )
    _lower_session(process.pid)
    return process


def _lower_session(pid: int) -> None:
    """
    Give a session of processes a low priority among sessions, where Linux shares the processor out
    to these first (sched(7), "The autogroup feature"): niceness counts within one alone.
    """
    for _ in range(20):
        try:
            Path(f"/proc/{pid}/autogroup").write_text(str(NICENESS))
        except BlockingIOError:  # one change in a tenth of a second is allowed
            time.sleep(0.1)
        except OSError:  # it shares out to processes, or the process has ended
            return
        else:
            return


def can_resume(folder: Path) -> bool:
    """Whether a run can be resumed."""
    return has_state(checkpoint_dir(folder, "last"))


def weights(hub: HubSection) -> str:
    """What identifies the weights of a hub: they may be replaced under the same name."""
    if hub.name == "none":
        return ""
    cards = load_hub(hub.name, weights=not hub.random_init)
    hashes = [encoder.sha256 or "" for encoder in cards.encoders]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:12]


def _device(job: Job) -> str:
    return load_config(job.config).train.device


def _await(ray: Any, pending: dict[Any, Job], stop: StopSignal, on_end: OnEnd) -> None:
    asked = False
    while pending:
        if stop.number is not None and not asked:
            for reference in pending:
                ray.cancel(reference)
            asked = True
        ended, _ = ray.wait(list(pending), num_returns=1, timeout=POLL_SECONDS)
        for reference in ended:
            on_end(pending.pop(reference), _ray_result(ray, reference))


def _not_started(job: Job, error: Exception) -> int:
    """Note why; its exit code."""
    with contextlib.suppress(OSError), job.log.open("a") as log:
        log.write(f"it could not be started: {reason(error)}\n")
    return 1


def _terminate(running: dict[Job, subprocess.Popen[bytes]]) -> None:
    for process in running.values():
        process.terminate()


def _ray_result(ray: Any, reference: Any) -> int:
    try:
        return int(ray.get(reference))
    except ray.exceptions.TaskCancelledError:
        return 128 + signal.SIGTERM
    except ray.exceptions.RayError as error:
        print(f"Ray: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
