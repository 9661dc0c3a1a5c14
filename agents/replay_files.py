"""A replay buffer on disk, in blocks that are written as they fill."""

from __future__ import annotations

import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from stable_baselines3.common.buffers import ReplayBuffer

from hubrl.files import DamagedFileError, reason, save_tensors
from hubrl.state_folder import link_file

#: Rows of a block: agent steps of one environment.
BLOCK = 1024
ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
#: The block's number, and that of the last row in it.
NAME = re.compile(r"replay-(\d{6,12})-\d{12,}\.safetensors", re.ASCII)


class ReplayFiles:
    """
    Writes a buffer's blocks into a folder; what has not changed since is not written again.

    Successive stacks of frames have most pixels in common, so the blocks are compressed: to about
    2 % of their size in memory for Atari games.

    :param buffer: of the model
    :param folder: of these files alone
    """

    def __init__(self, buffer: ReplayBuffer, folder: Path) -> None:
        self._buffer, self._folder = buffer, folder
        self._files: dict[int, Path] = {}
        self._n_rows = 0

    def restore(self, checkpoint: Path, n_rows: int) -> None:
        """
        Fill the buffer from a checkpoint.

        :param checkpoint: a folder with files of ``update``
        :param n_rows: all rows that had been added to the buffer until then
        :raises DamagedFileError: if a file is missing or does not fit the buffer
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._n_rows, size = n_rows, self._buffer.buffer_size
        self._buffer.pos, self._buffer.full = n_rows % size, n_rows >= size
        files = [(NAME.fullmatch(file.name), file) for file in checkpoint.iterdir()]
        found = {int(match[1]): file for match, file in files if match}
        for block in range(-(-min(n_rows, size) // BLOCK)):
            if block not in found:
                raise DamagedFileError(f"checkpoint {checkpoint} lacks replay block {block}")
            self._read(found[block], block)
            self._files[block] = self._folder / found[block].name
            link_file(found[block], self._files[block])

    def update(self, n_rows: int, *, partly: bool) -> list[Path]:
        """
        Write the blocks that changed since the last call.

        :param n_rows: all rows that were ever added to the buffer
        :param partly: write also the block that is being filled
        :return: the files that hold the buffer, as long as it is not written again
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        for first, last in self._changed(n_rows):
            if partly or last % self._buffer.buffer_size % BLOCK == 0:
                self._write(first, last)
                self._n_rows = last
        return list(self._files.values())

    def _changed(self, n_rows: int) -> list[tuple[int, int]]:
        """Ranges of new rows, each within one block; counted from the first row ever added."""
        size = self._buffer.buffer_size
        ranges = []
        first = max(self._n_rows, n_rows - size)
        while first < n_rows:
            place = first % size
            last = min(n_rows, first - place + min(place - place % BLOCK + BLOCK, size))
            ranges.append((first, last))
            first = last
        return ranges

    def _write(self, first: int, last: int) -> None:
        block = first % self._buffer.buffer_size // BLOCK
        file = self._folder / f"replay-{block:06}-{last:012}.safetensors"
        rows = self._rows(block)
        save_tensors(
            {name: _compressed(getattr(self._buffer, name)[rows]) for name in ARRAYS}, file
        )
        before = self._files.get(block)
        if before is not None and before != file:
            before.unlink(missing_ok=True)
        self._files[block] = file

    def _rows(self, block: int) -> slice:
        return slice(block * BLOCK, min((block + 1) * BLOCK, self._buffer.buffer_size))

    def _read(self, file: Path, block: int) -> None:
        try:
            tensors = load_file(file)
            for name in ARRAYS:
                array = getattr(self._buffer, name)[self._rows(block)]
                array[...] = _decompressed(tensors[name].numpy(), array)
        except (OSError, SafetensorError, KeyError, zlib.error, TypeError, ValueError) as error:
            raise DamagedFileError(
                f"checkpoint file {file} can't be loaded: {reason(error)}"
            ) from None


def _compressed(array: np.ndarray) -> torch.Tensor:
    """Rows of one environment together, where their likeness is within reach of the compressor."""
    packed = zlib.compress(array.swapaxes(0, 1).tobytes(), level=2)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def _decompressed(packed: np.ndarray, like: np.ndarray) -> np.ndarray:
    """
    :raises ValueError: if it is of another size
    """
    content = zlib.decompressobj().decompress(packed.tobytes(), like.nbytes + 1)
    if len(content) != like.nbytes:
        raise ValueError(f"its arrays have another size than a buffer of {like.shape} rows has")
    swapped = like.swapaxes(0, 1)
    return np.frombuffer(content, like.dtype).reshape(swapped.shape).swapaxes(0, 1)
