"""Callbacks of a run: log and progress lines, evaluation, checkpoints, a stop by a signal."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

from sb3_contrib import QRDQN
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import safe_mean
from stable_baselines3.common.vec_env import VecEnv

from agents.checkpoints import BestCheckpoint, save_checkpoint
from agents.config import TrainSection
from agents.evaluation import Episodes, evaluate
from agents.faults import check_weights
from agents.replay_files import ReplayFiles
from agents.run_state import EnvState, RunState, run_state
from agents.runs import (
    EPISODES_FILE,
    EVALUATIONS_FILE,
    PROGRESS_FILE,
    SECONDS,
    checkpoint_dir,
    derive_seed,
)
from hubrl.callback import places
from hubrl.encoder_list import EncoderChange
from hubrl.run_folder import CsvTable, cell_number, read_rows
from hubrl.signals import StopSignal
from hubrl.state_folder import has_state, read_state, repair_state

#: Agent steps between two rows of ``progress.csv``: a PPO iteration of 8 environments.
LOG_FREQ = 1024
#: Seconds between two lines on the screen.
LINE_SECONDS = 10.0


class EveryN:
    """
    Tells when ``freq`` more agent steps are done.

    :param freq: 0: never
    :param timesteps: where counting starts
    """

    def __init__(self, freq: int, timesteps: int) -> None:
        self._freq = freq
        self._count = timesteps // max(freq, 1)

    def is_due(self, timesteps: int) -> bool:
        """Whether a multiple of ``freq`` was passed since the last time it was due."""
        count = timesteps // max(self._freq, 1)
        due = self._freq > 0 and count > self._count
        self._count = max(count, self._count)
        return due


class ProgressCallback(BaseCallback):
    """
    Writes the log every ``LOG_FREQ`` steps, and a line to the screen every ``LINE_SECONDS``.

    All of it happens as a rollout starts, when the last update's numbers are there.
    """

    def _on_training_start(self) -> None:
        self._log = EveryN(LOG_FREQ, self.num_timesteps)
        self._line = (time.monotonic(), self.num_timesteps)

    def _on_rollout_start(self) -> None:
        if self._log.is_due(self.num_timesteps):
            self.model.dump_logs()
        if time.monotonic() - self._line[0] >= LINE_SECONDS:
            self._print_line()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.model.dump_logs()
        self._print_line()

    def _print_line(self) -> None:
        """Time, steps, mean return of the last games, steps per second since the last line."""
        now, (then, timesteps) = time.monotonic(), self._line
        self._line = (now, self.num_timesteps)
        speed = (self.num_timesteps - timesteps) / max(now - then, 1e-9)
        games = self.model.ep_info_buffer or ()
        share = min(1.0, self.num_timesteps / self.model._total_timesteps)
        mean = (
            f"mean return of {len(games)} games: {safe_mean([game['r'] for game in games]):.2f}"
            if games
            else "no game has ended yet"
        )
        _print(f"{self.num_timesteps:,} steps ({share:.1%})  {mean}  {speed:,.0f} steps/s")


class EpisodesCallback(BaseCallback):
    """
    Keeps ``episodes.csv``: steps, unclipped return, length and seconds of each whole game.

    The length is the environment's: emulator frames in Atari. The seconds count from the run's
    start, evaluations included; ``progress.csv`` has them, too, and a resumed run goes on from the
    last kept row of the two.

    :param folder: of the run
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._file, self._progress_file = folder / EPISODES_FILE, folder / PROGRESS_FILE

    def _on_training_start(self) -> None:
        self._table = CsvTable(self._file, "timesteps", self.num_timesteps)
        last = [(self._table.last_row, "seconds", self._file)]
        last += [(row, SECONDS, self._progress_file) for row in read_rows(self._progress_file)[-1:]]
        before = [cell_number(*cell) for cell in last if cell[0].get(cell[1])]
        self._start = time.monotonic() - max(before, default=0.0)

    def _on_rollout_start(self) -> None:
        self.logger.record(SECONDS, self._seconds(), exclude="tensorboard")

    def _on_training_end(self) -> None:
        self.logger.record(SECONDS, self._seconds(), exclude="tensorboard")

    def _seconds(self) -> float:
        return round(time.monotonic() - self._start, 2)

    def _on_step(self) -> bool:
        for info in self.locals["infos"]:
            if "episode" in info:
                self._keep(info["episode"])
        return True

    def _keep(self, game: dict[str, float]) -> None:
        row = {"timesteps": self.num_timesteps, "return": float(game["r"])}
        self._table.append(row | {"length": int(game["l"]), "seconds": self._seconds()})


class EvaluationCallback(BaseCallback):
    """
    Plays whole games now and then; keeps the best model and ``evaluations.csv``.

    :param folder: of the run
    :param make_env: gives an environment of its own: whole games, unclipped rewards; called for
        the first evaluation, so that training need not wait for it
    :param train: frequency, number of games, how actions are taken
    :param stop: ends an evaluation early
    """

    def __init__(
        self,
        folder: Path,
        make_env: Callable[[], VecEnv],
        train: TrainSection,
        stop: StopSignal,
    ) -> None:
        super().__init__()
        self._file = folder / EVALUATIONS_FILE
        self._best_checkpoint = checkpoint_dir(folder, "best")
        self._make_env = make_env
        self._env: VecEnv | None = None
        self._train = train
        self._stop = stop
        self._best_mean = float("-inf")

    def _on_training_start(self) -> None:
        self._table = CsvTable(self._file, "timesteps", self.num_timesteps)
        # An evaluation that a signal cut short is made up for when the run is resumed.
        self._last = self._table.last_step
        self._due = EveryN(self._train.eval_freq, self._last)
        repair_state(self._best_checkpoint)
        if has_state(self._best_checkpoint):
            self._best_mean = read_state(self._best_checkpoint, BestCheckpoint)["mean_return"]

    def _on_rollout_start(self) -> None:
        if self._due.is_due(self.num_timesteps):
            self._evaluate()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self._train.eval_freq > 0 and self._last < self.num_timesteps:
            self._evaluate()

    def _evaluate(self) -> None:
        check_weights(self.model)  # or NaN could be the best
        if self._env is None:
            self._env = self._make_env()
        episodes = evaluate(
            self.model,
            self._env,
            self._train.n_eval_episodes,
            deterministic=self._train.deterministic_eval,
            seed=derive_seed(self._train.seed, "evaluation"),
            is_stopped=lambda: self._stop.number is not None,
        )
        if episodes is not None:
            self._keep(episodes)

    def _keep(self, episodes: Episodes) -> None:
        mean = safe_mean(episodes.returns)
        if mean > self._best_mean:
            self._best_mean = mean
            save_checkpoint(self.model, self._best_checkpoint, {"mean_return": mean})
        # Last: these rows say that the evaluation is done, and a kill may come before them.
        self._last = self.num_timesteps
        self._table.append(
            *(
                {"timesteps": self._last, "episode": i, "return": score, "length": length}
                for i, (score, length) in enumerate(zip(*episodes, strict=True))
            )
        )
        self.logger.record("eval/mean_reward", mean)
        self.logger.record("eval/mean_ep_length", safe_mean(episodes.lengths))
        _print(f"{self._last:,} steps  evaluation: mean return {mean:.2f}")


class EncodersCallback(BaseCallback):
    """Prints at the end which encoders are as in their files, and how far the others moved."""

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        extractors = places(self.model.policy)
        rows = [
            (f"{place}/{row.name}" if len(extractors) > 1 else row.name, row)
            for place, extractor in extractors.items()
            for row in extractor.pathway.encoders.changes()
        ]
        width = max(len(name) for name, _ in rows)
        for name, row in rows:
            kind = "frozen" if row.is_frozen else "trained"
            _print(f"encoder {name:<{width}}  {kind:<7}  {_change(row)}")


def _change(row: EncoderChange) -> str:
    if row.distance is None:
        return "began with random weights"
    if row.is_same:
        return "unchanged, the bytes of its file"
    return f"moved by {row.distance:.3g} of its weights' length"


class CheckpointCallback(BaseCallback):
    """
    Saves the last checkpoint now and then, at the end, and when a signal stops the run.

    A checkpoint is where a rollout starts: one that a signal cuts short is not counted, and is
    collected again when the run is resumed.

    :param folder: of the run
    :param train: steps between checkpoints, and how many stay
    :param stop: stops the run
    :param env_state: as in ``run_state``
    :param n_rollbacks: how often it was rolled back, which its checkpoints tell
    """

    def __init__(
        self,
        folder: Path,
        train: TrainSection,
        stop: StopSignal,
        env_state: EnvState,
        n_rollbacks: int = 0,
    ) -> None:
        super().__init__()
        self._folder = folder
        self._train = train
        self._stop = stop
        self._env_state = env_state
        self._extra = {"n_rollbacks": n_rollbacks}
        self._run: RunState | None = None
        self._is_collecting = False
        self._replay: ReplayFiles | None = None

    def _on_training_start(self) -> None:
        self._due = EveryN(self._train.save_freq, self.num_timesteps)
        buffer = getattr(self.model, "replay_buffer", None)
        if buffer is not None:
            self._replay = ReplayFiles(buffer, checkpoint_dir(self._folder, "replay"))
            if self.num_timesteps > 0:
                self._replay.restore(checkpoint_dir(self._folder, "last"), self._n_rows())

    def _on_rollout_start(self) -> None:
        self._run, self._is_collecting = run_state(self.model, self._env_state), True
        if self._replay is not None:
            self._replay.update(self._n_rows(), partly=False)
        if self._due.is_due(self.num_timesteps):
            self.save()

    def _on_step(self) -> bool:
        if self._stop.number is None:
            return True
        return self._has_moved_target(self.locals.get("num_collected_steps", 1) - 1)

    def _on_rollout_end(self) -> None:  # of whole ones alone
        self._is_collecting = False

    def _on_training_end(self) -> None:
        # As a resumed run is, which may come here once more, for the last evaluation alone.
        self.model.policy.set_training_mode(False)
        if not self._is_collecting:
            self._run = run_state(self.model, self._env_state)
        self.save()
        gc.collect()  # the models of runs before this one in the same process

    def save(self) -> None:
        """Save where the last rollout started; nothing if there was none."""
        if self._run is None:
            return
        check_weights(self.model)
        n_rows = self._run.num_timesteps // self.model.n_envs
        files = [] if self._replay is None else self._replay.update(n_rows, partly=True)
        folder, keep = checkpoint_dir(self._folder, "last"), self._train.n_checkpoints
        save_checkpoint(self.model, folder, self._extra, run=self._run, files=files, keep=keep)
        _give_memory_back()

    def save_after_fault(self) -> None:
        """
        ``save``, when the environment failed within a rollout; nothing if the model is another one
        by now than where the rollout started: the checkpoint before is whole.
        """
        started = self.num_timesteps if self._run is None else self._run.num_timesteps
        if not self._is_collecting or not self._has_moved_target(self.num_timesteps - started):
            self.save()

    def _has_moved_target(self, n_steps: int) -> bool:
        """
        DQN's target network moves between the steps of a rollout (tau).

        :param n_steps: that the rollout has behind it
        """
        return isinstance(self.model, (DQN, QRDQN)) and self.model.tau < 1 and n_steps > 0

    def _n_rows(self) -> int:
        return self.num_timesteps // self.model.n_envs


def _give_memory_back() -> None:
    """What a checkpoint left to Python, and what the C library keeps between the tensors in use."""
    gc.collect(1)  # of a checkpoint it finds as much as of all generations, a third of a second
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _print(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
