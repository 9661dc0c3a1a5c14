"""A rollout buffer whose minibatches are taken on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from torch import Tensor


class DeviceRolloutBuffer(RolloutBuffer):
    """
    SB3's, of which a whole rollout goes to the device at once, for ``rollout_buffer_class``.

    SB3 gathers each minibatch in the host's memory and sends it, in each epoch anew. With 256
    observations of an Atari game that takes longer than a GPU's update of a NatureCNN.
    """

    def reset(self) -> None:
        """Begin a rollout."""
        super().reset()
        self._on_device: tuple[Tensor, ...] = ()

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> RolloutBufferSamples:
        if not self._on_device:
            whole = super()._get_samples(np.arange(self.buffer_size * self.n_envs))
            self._on_device = tuple(whole)
        rows_B = torch.as_tensor(batch_inds, device=self.device)
        return RolloutBufferSamples(*(column.index_select(0, rows_B) for column in self._on_device))
