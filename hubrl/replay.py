"""Routing replay: one routing of an observation, from its collection to its last update."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Shape letters: B batch, E encoders, K top k, N bytes or numbers of one observation,
# R rows of the batch that activate one encoder, D its features.

# Odd 64-bit constants of SplitMix64 (Steele, Lea, Flood 2014), as signed integers.
GOLDEN = -7046029254386353131
MIX_1 = -4658895280553007687
MIX_2 = -7723592293110705685
CHUNK = 64  # observations that are hashed at once: more fall out of the cache


class RoutingReplay(nn.Module):
    """
    Gives an observation the same noise and the same activated encoders throughout an iteration.

    Noise is a function of the observation's content and of a key that changes with each rollout, so
    it is found again without a place in SB3's buffers. The activated encoders would change while
    the generator learns; they are remembered by the observation's hash.

    :param n_encoders: E
    """

    key: Tensor

    def __init__(self, n_encoders: int) -> None:
        super().__init__()
        self.n_encoders = n_encoders
        self.register_buffer("key", torch.randint(1 << 62, ()))
        self._collected: list[tuple[Tensor, Tensor]] = []
        self._table: _Table | None = None

    def next_rollout(self) -> None:
        """Forget the last rollout's routing and change the key."""
        self.key += 1
        self.forget()

    def forget(self) -> None:
        """Forget which encoders were activated."""
        self._collected.clear()
        self._table = None

    def hash(self, observations: Tensor) -> Tensor:
        """64-bit hash of each observation's bytes, (B,) int64; exact, so equal on any batch."""
        words_BN = _as_int64(observations.flatten(1))
        index_2N = torch.arange(1, 2 * words_BN.shape[1] + 1, device=words_BN.device)
        factor_N, upper_factor_N = (_mix(index_2N * GOLDEN) | 1).chunk(2)
        # Products lose a word's upper bits, so these have a factor of their own.
        parts = [
            (words >> 32).mul_(upper_factor_N).addcmul_(words, factor_N).sum(dim=1)
            for words in words_BN.split(CHUNK)
        ]
        return _mix(torch.cat(parts))

    def noise(self, hash_B: Tensor) -> Tensor:
        """Standard normal numbers (B, E) that follow from hash and key alone (Box-Muller)."""
        counter_2E = torch.arange(1, 2 * self.n_encoders + 1, device=hash_B.device) * GOLDEN
        bits_B2E = _mix(_mix(hash_B + _mix(self.key))[:, None] + counter_2E)
        # The upper 53 bits, as uniform numbers in (0, 1): never 0, whose logarithm is infinite.
        uniform_B2E = ((bits_B2E >> 11) & ((1 << 53) - 1)).double().add(0.5) / (1 << 53)
        radius_BE = (-2 * uniform_B2E[:, : self.n_encoders].log()).sqrt()
        angle_BE = 2 * math.pi * uniform_B2E[:, self.n_encoders :]
        return (radius_BE * angle_BE.cos()).float()

    def remember(self, hash_B: Tensor, activated_BK: Tensor) -> None:
        """Keep which encoders the observations activated when they were collected."""
        self._collected.append((hash_B, activated_BK))
        self._table = None

    def recall(self, hash_B: Tensor) -> Tensor | None:
        """
        The encoders that the observations activated when they were collected, (B, K).

        Rows of observations that were not collected are -1; None if nothing was.
        """
        if not self._collected:
            return None
        if self._table is None:
            self._table = _Table.of(self._collected)
        place_B, known_B = self._table.places(hash_B)
        return self._table.values[place_B].where(known_B[:, None], -1)


class FeatureCache:
    """
    Features of frozen encoders, from an observation's collection to its last update.

    The activated encoders of a collected observation stay the same for the whole iteration, so
    only their features are needed: top_k times features_dim numbers for each observation.
    """

    def __init__(self) -> None:
        self._stored: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._tables: dict[int, _Table] = {}

    def clear(self) -> None:
        """Forget all features."""
        self._stored.clear()
        self._tables.clear()

    def store(self, i: int, hash_R: Tensor, features_RD: Tensor) -> None:
        """Keep what encoder i made of the observations with these hashes."""
        self._stored.setdefault(i, []).append((hash_R, features_RD))
        self._tables.pop(i, None)

    def find(self, i: int, hash_R: Tensor) -> Tensor | None:
        """What encoder i made of these observations, (R, D); None unless all of them are known."""
        if i not in self._stored:
            return None
        if i not in self._tables:
            self._tables[i] = _Table.of(self._stored[i])
        place_R, known_R = self._tables[i].places(hash_R)
        return self._tables[i].values[place_R] if known_R.all() else None


class _Table(NamedTuple):
    """Values that are found by hash."""

    hashes: Tensor
    """(N,) int64, ascending."""
    order: Tensor
    """Their rows in ``values``, (N,)."""
    values: Tensor
    """(N, ...)."""

    @classmethod
    def of(cls, collected: list[tuple[Tensor, Tensor]]) -> _Table:
        hashes, values = (torch.cat(column) for column in zip(*collected, strict=True))
        hashes, order = hashes.sort()
        return cls(hashes, order, values)

    def places(self, hash_B: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of ``values``, and whether they are the ones asked for; (B,) each."""
        place_B = torch.searchsorted(self.hashes, hash_B).clamp_max(len(self.hashes) - 1)
        return self.order[place_B], self.hashes[place_B] == hash_B


def _as_int64(rows_BN: Tensor) -> Tensor:
    """The rows' bytes as 64-bit words; a rest that fills no word is padded with zeros."""
    bytes_BN = rows_BN.contiguous().view(torch.uint8)
    rest = -bytes_BN.shape[1] % 8
    if rest:
        bytes_BN = nn.functional.pad(bytes_BN, (0, rest))
    return bytes_BN.view(torch.int64)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser; multiplications wrap around."""
    bits = (bits ^ _shift(bits, 30)) * MIX_1
    bits = (bits ^ _shift(bits, 27)) * MIX_2
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, n: int) -> Tensor:
    """Logical shift to the right: torch's keeps the sign."""
    return (bits >> n) & ((1 << (64 - n)) - 1)
