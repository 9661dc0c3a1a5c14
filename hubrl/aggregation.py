"""Aggregation: from the weighted features of the activated encoders to one vector (torch only)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hubrl.encoders import Casts, is_frozen, orthogonal_init
from hubrl.specs import closest

# Shape letters: B batch, E encoders, D features of one encoder, O features out,
# R rows of the batch that activate one encoder.


def build_aggregator(aggregation: str, features_dims: list[int], features_dim: int) -> Concat | Sum:
    """
    :param aggregation: a key of ``AGGREGATIONS``, or ``auto`` as in ``aggregation_name``
    :param features_dims: the encoders' features_dim
    :param features_dim: length of the aggregated features, O
    :raises ValueError: if ``aggregation`` is unknown, or can't take features of these lengths
    """
    name = aggregation_name(aggregation, features_dims)
    return AGGREGATIONS[name](features_dims, features_dim)


def aggregation_name(aggregation: str, features_dims: list[int]) -> str:
    """
    The key of ``AGGREGATIONS``; for ``auto`` it is ``sum`` where the features have one length.

    :param aggregation: ``auto``, or the key itself
    :param features_dims: the encoders' features_dim
    :raises ValueError: if there is no such aggregation
    """
    if aggregation == "auto":
        return "sum" if len(set(features_dims)) == 1 else "concat"
    if aggregation not in AGGREGATIONS:
        allowed = ("auto", *AGGREGATIONS)
        raise ValueError(
            f"aggregation is {aggregation!r}{closest(aggregation, allowed)}, "
            f"allowed: {', '.join(allowed)}"
        )
    return aggregation


class Contribution(NamedTuple):
    """What one encoder contributes to a batch."""

    i: int
    """Its index."""
    rows_R: Tensor
    """The rows that activate it, ascending; or all rows, of which the others have weight 0."""
    features_RD: Tensor
    """Its features of these rows, in the format of computation."""


class Concat(nn.Module):
    """
    A linear layer over the concatenated, weighted features, of which only activated blocks run.

    ``A(concat_i [w_i * o_i]) = bias + sum_i w_i * (block_i o_i)``, then ReLU.

    :param features_dims: the encoders' features_dim
    :param features_dim: length of the aggregated features, O
    :param relu: whether the ReLU follows
    """

    def __init__(self, features_dims: list[int], features_dim: int, *, relu: bool = True) -> None:
        super().__init__()
        self._relu = relu
        self.blocks = nn.ModuleList(nn.Linear(n, features_dim, bias=False) for n in features_dims)
        self.bias = nn.Parameter(torch.zeros(features_dim))
        orthogonal_init(self.blocks)

    def forward(
        self, contributions: Iterable[Contribution], weights_BE: Tensor, casts: Casts | None = None
    ) -> Tensor:
        """
        Aggregated features (B, O) float32.

        :param contributions: of the encoders that are activated
        :param weights_BE: pathway weights
        :param casts: as in ``HubPathway.route``
        """
        total_BO = self.bias.expand(weights_BE.shape[0], -1)
        for i, rows_R, features_RD in contributions:
            features_RO = _linear(self.blocks[i], features_RD, casts)
            weighted_RO = features_RO.float() * weights_BE[rows_R, i, None]
            total_BO = total_BO.index_add(0, rows_R, weighted_RO)
        return total_BO.relu() if self._relu else total_BO


class Sum(nn.Module):
    """
    A linear layer over the weighted sum of the features, ``A(sum_i w_i * o_i)``, then ReLU.

    All encoders share the layer, so that it learns from every row and costs as much as one
    encoder's; their features must have one length.

    :param features_dims: the encoders' features_dim
    :param features_dim: length of the aggregated features, O
    :raises ValueError: if the encoders differ in features_dim
    """

    def __init__(self, features_dims: list[int], features_dim: int) -> None:
        super().__init__()
        if len(set(features_dims)) > 1:
            raise ValueError(
                f"aggregation is 'sum', but the encoders have features_dim "
                f"{', '.join(map(str, features_dims))}: only 'concat' takes features of any length"
            )
        self.linear = nn.Linear(features_dims[0], features_dim)
        orthogonal_init(self)

    def forward(
        self, contributions: Iterable[Contribution], weights_BE: Tensor, casts: Casts | None = None
    ) -> Tensor:
        """As in ``Concat``."""
        total_BD = weights_BE.new_zeros(weights_BE.shape[0], self.linear.in_features)
        for i, rows_R, features_RD in contributions:
            total_BD = total_BD.to(features_RD.dtype)
            weighted_RD = features_RD * weights_BE[rows_R, i, None].to(features_RD.dtype)
            total_BD = total_BD.index_add(0, rows_R, weighted_RD)
        return (_linear(self.linear, total_BD, casts).float() + self.linear.bias).relu()


class Standardised(nn.Module):
    """
    An aggregator that gets the features of each encoder in one scale.

    Ours. Pretrained features differ in length from encoder to encoder and from task to task, and
    mostly say the same of all observations: of those of ``atari5`` in Breakout 3 to 20 % tell
    one from another. A step of Adam has one size for all weights, so a linear layer over small
    features learns slowly, and one over a large constant part learns that first.

    Each encoder's running mean is subtracted, except a part as long as ``SHARED`` deviations. That
    part, the same for all observations, stays because a policy that hardly depends on them, such
    as always going one way, is learned from it faster than from a bias alone. The rest is divided
    by one running deviation for the whole vector, the root of a running median of mean squares, and
    multiplied by ``SCALE``. (Or of a quarter of their mean, where most observations are the same.)

    Mean and deviation run over rows that were trained on, and come into use when training mode is
    left, since an update goes on with the policy of its rollout, or by ``take_up``. Rows that are
    further than ``LIMIT`` deviations away, as the first of a game, whose frames before are black,
    are brought back to that distance and count in neither, unless most of a batch are.

    :param aggregator: as ``Concat`` and ``Sum``
    :param features_dims: the encoders' features_dim
    """

    SCALE = 0.25
    SHARED = 1.0
    LIMIT = 4.0
    MEMORY = 25_600  # rows, each epoch counted: six rollouts of PPO for an encoder always active
    FIRST = 64  # rows before anything changes

    running_variance_E: Tensor
    running_rows_E: Tensor

    def __init__(self, aggregator: nn.Module, features_dims: list[int]) -> None:
        super().__init__()
        self.aggregator = aggregator
        # SB3 copies buffers with running_ in their names to target networks, without averaging.
        for i, n in enumerate(features_dims):
            self._register(f"mean_{i}", n)
        self._register("variance_E", len(features_dims))
        self._register("rows_E", len(features_dims))

    def train(self, mode: bool = True) -> Self:
        """In training mode the numbers of when it was entered are in use, else the newest."""
        if mode and not self.training:
            self.take_up()
        return super().train(mode)

    def forward(
        self, contributions: Iterable[Contribution], weights_BE: Tensor, casts: Casts | None = None
    ) -> Tensor:
        """As in ``Concat``; in training mode, where it learns, the running numbers follow."""
        is_learning = self.training and torch.is_grad_enabled() and not is_frozen(self)
        used = "start" if self.training else "running"
        variance_E = self.get_buffer(f"{used}_variance_E")
        is_known_E = self.get_buffer(f"{used}_rows_E") >= self.FIRST
        centred, distance_BE = [], torch.zeros_like(weights_BE)
        for i, rows_R, features_RD in contributions:
            start_D = self.get_buffer(f"{used}_mean_{i}") * is_known_E[i]
            kept_D = start_D * self._kept_share(start_D, variance_E[i])
            base_D = start_D - kept_D
            centred_RD = features_RD - base_D  # float32, as the means are
            with torch.no_grad():
                distance_BE[rows_R, i] = _mean_squares(centred_RD, kept_D)
                if is_learning and len(rows_R) > 0:
                    self._follow(i, centred_RD, base_D, weights_BE[rows_R, i] > 0)
            centred.append(Contribution(i, rows_R, centred_RD.to(features_RD.dtype)))
        limit_E = self.LIMIT**2 * variance_E.clamp_min(1e-8)
        scale_BE = self.SCALE * self.LIMIT * torch.maximum(distance_BE, limit_E).rsqrt()
        # Scaling weights, one for a row, costs less than scaling features.
        scaled_BE = weights_BE * scale_BE.where(is_known_E, 1.0)
        features_BO: Tensor = self.aggregator(centred, scaled_BE, casts)
        return features_BO

    def _kept_share(self, mean_D: Tensor, variance: Tensor) -> Tensor:
        """Of the mean: what is as long as ``SHARED`` deviations, or all of a shorter one."""
        length = mean_D.square().mean().sqrt().clamp_min(1e-8)
        share: Tensor = self.SHARED * variance.sqrt() / length
        return share.clamp_max(1.0)

    def _follow(self, i: int, centred_RD: Tensor, base_D: Tensor, counts_R: Tensor) -> None:
        """
        Take rows into encoder i's running numbers.

        :param centred_RD: its features less ``base_D``
        :param counts_R: which rows; the others don't activate it
        """
        mean_D, variance = self.get_buffer(f"running_mean_{i}"), self.running_variance_E[i]
        rows, n_rows = self.running_rows_E[i], counts_R.sum()
        first_D = counts_R.float() @ centred_RD / n_rows
        moved_D = torch.where(rows > 0, mean_D - base_D, first_D)
        distance_R = torch.linalg.vector_norm(centred_RD - moved_D, dim=1).square() / len(moved_D)
        is_near_R = counts_R & ((distance_R <= self.LIMIT**2 * variance) | (rows < self.FIRST))
        # If most are far, the encoder or the task has changed.
        is_near_R = torch.where(is_near_R.sum() < 0.5 * n_rows, counts_R, is_near_R).float()
        near_D = base_D + is_near_R @ centred_RD / is_near_R.sum()
        # Features that are not finite, which training goes on to report, would stay in all means.
        is_finite = near_D.isfinite().all()
        n_near = is_near_R.sum() * is_finite
        share = (n_near / (rows + n_near).clamp(1, self.MEMORY)).clamp_max(1.0)
        mean_D.lerp_(near_D.where(is_finite, mean_D), share)
        spread = self._spread(distance_R, counts_R, variance * (rows >= self.FIRST))
        variance.lerp_(spread.where(is_finite, variance), share)
        rows.add_(n_near)

    def _spread(self, distance_R: Tensor, counts_R: Tensor, variance: Tensor) -> Tensor:
        """
        The median of the rows that count, or a quarter of their mean, each up to the limit.

        The median alone would be that of noise where most observations look the same, and all
        others would be far away.
        """
        limited_R = distance_R.clamp_max(self.LIMIT**2 * variance)
        quarter = 0.25 * limited_R @ counts_R.float() / counts_R.sum()
        return torch.maximum(_median(distance_R, counts_R), quarter)

    def _register(self, name: str, n: int) -> None:
        """Running numbers, and what they were when training mode was entered."""
        self.register_buffer(f"running_{name}", torch.zeros(n))
        self.register_buffer(f"start_{name}", torch.zeros(n), persistent=False)

    def take_up(self) -> None:
        """Have the newest numbers in use in training mode, too."""
        for name, start in self.named_buffers(recurse=False):
            if name.startswith("start_"):
                start.copy_(self.get_buffer(name.replace("start_", "running_", 1)))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.take_up()


#: How features become one vector.
AGGREGATIONS: dict[str, type[Concat] | type[Sum]] = {"concat": Concat, "sum": Sum}


def _mean_squares(features_RD: Tensor, mean_D: Tensor) -> Tensor:
    """
    Mean square of each row's distance from a mean, (R,), without a copy of the rows.

    :param mean_D: no longer than a few of these distances, or rounding takes them
    """
    squares_R = torch.linalg.vector_norm(features_RD, dim=1).square()
    total_R: Tensor = squares_R - 2 * (features_RD @ mean_D) + mean_D.square().sum()
    return total_R.clamp_min(0) / len(mean_D)


def _median(numbers_R: Tensor, counts_R: Tensor) -> Tensor:
    """Of those that count, the lower one of two; torch's nanmedian would wait for a GPU."""
    sorted_R = numbers_R.where(counts_R, torch.inf).sort().values
    middle = (counts_R.sum() - 1).clamp_min(0) // 2
    return sorted_R.index_select(0, middle[None])[0]


def _linear(layer: nn.Module, features_RD: Tensor, casts: Casts | None) -> Tensor:
    """The layer without its bias, in the format of the features."""
    weight, dtype = layer.weight, features_RD.dtype
    assert isinstance(weight, Tensor)
    return F.linear(features_RD, casts.weight(weight, dtype) if casts else weight.to(dtype))
