"""The folder of a run: configuration, command, checkpoints, TensorBoard events, CSV files."""

from __future__ import annotations

import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.logger import (
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
    filter_excluded_keys,
)
from torch.utils.tensorboard import SummaryWriter

from agents.config import LATER_KEYS, RunConfig, dump_config, parse_config
from hubrl.run_folder import CsvTable, config_file, create_folder
from hubrl.sections import read_mapping, with_later_keys
from hubrl.specs import load_hub
from hubrl.state_folder import has_state

PROGRESS_FILE = "progress.csv"
#: Its columns with agent steps, and with seconds since the run's start, over all its processes.
STEPS, SECONDS = "time/total_timesteps", "time/seconds"
EVALUATIONS_FILE = "evaluations.csv"
EPISODES_FILE = "episodes.csv"


def default_run_dir(config: RunConfig) -> Path:
    """
    ``runs/<algo>-<env>-<hub>-s<seed>-<timestamp>``.

    :raises ValueError: if there is no such hub
    """
    env = config.env.id.removeprefix("ALE/").replace("/", "_")
    hub = "none" if config.hub.name == "none" else load_hub(config.hub.name, weights=False).name
    hub = hub.replace(":", "_") + ("-random" if config.hub.random_init else "")
    now = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs", f"{config.algorithm.name}-{env}-{hub}-s{config.train.seed}-{now}")


def create_run(folder: Path, config: RunConfig) -> None:
    """
    Make the folder with the resolved configuration.

    :raises ValueError: if another command has made it in the meantime
    """
    create_folder(folder, dump_config(config))


def open_run(folder: Path) -> RunConfig:
    """
    The configuration of a run.

    :raises ValueError: if the folder is not that of a run
    """
    return parse_config(with_later_keys(read_mapping(config_file(folder)), LATER_KEYS))


def checkpoint_dir(folder: Path, name: str) -> Path:
    """
    :param name: ``last``, ``best``, or ``replay`` for the blocks of a replay buffer
    """
    return folder / "checkpoints" / name


def best_checkpoint(folder: Path) -> str:
    """The name of that by which a run is judged: ``best`` where there is one, else ``last``."""
    return "best" if has_state(checkpoint_dir(folder, "best")) else "last"


def derive_seed(seed: int, purpose: str) -> int:
    """
    A seed of its own for each purpose, 0..2^32-1.

    :param seed: of the run
    """
    # The 0 was once where a run was resumed; without it all seeds would be others.
    sequence = np.random.SeedSequence((seed, zlib.crc32(purpose.encode()), 0))
    return int(sequence.generate_state(1)[0])


def make_logger(folder: Path, timesteps: int) -> Logger:
    """
    SB3's logger, writing ``progress.csv`` and TensorBoard events.

    :param timesteps: a resumed run starts here; what was logged after it is dropped
    """
    return Logger(str(folder), [_ProgressCsv(folder, timesteps), _Events(folder, timesteps)])


class _ProgressCsv(KVWriter):
    """SB3's own CSV format starts its file anew, which would lose a resumed run's past."""

    def __init__(self, folder: Path, timesteps: int) -> None:
        self._table = CsvTable(folder / PROGRESS_FILE, STEPS, timesteps)

    def write(
        self,
        key_values: dict[str, Any],
        key_excluded: dict[str, tuple[str, ...]],
        step: int = 0,
    ) -> None:
        self._table.append(filter_excluded_keys(key_values, key_excluded, "csv"))

    def close(self) -> None:
        pass


class _Events(TensorBoardOutputFormat):
    def __init__(self, folder: Path, timesteps: int) -> None:
        # SB3's own __init__ takes no purge_step, by which TensorBoard drops what was logged later.
        self._is_closed = False
        self.writer = SummaryWriter(str(folder), purge_step=timesteps + 1)
