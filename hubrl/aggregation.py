"""Aggregation: from the weighted features of the activated encoders to one vector (torch only)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hubrl.encoders import Casts, orthogonal_init
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


class Part(NamedTuple):
    """What one encoder contributes to a batch."""

    i: int
    """Its index."""
    rows_R: Tensor
    """The rows that activate it, ascending."""
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
        self, parts: Iterable[Part], weights_BE: Tensor, casts: Casts | None = None
    ) -> Tensor:
        """
        Aggregated features (B, O) float32.

        :param parts: of the encoders that are activated
        :param weights_BE: pathway weights
        :param casts: as in ``HubPathway.route``
        """
        total_BO = self.bias.expand(weights_BE.shape[0], -1)
        for i, rows_R, features_RD in parts:
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
        self, parts: Iterable[Part], weights_BE: Tensor, casts: Casts | None = None
    ) -> Tensor:
        """As in ``Concat``."""
        total_BD = weights_BE.new_zeros(weights_BE.shape[0], self.linear.in_features)
        for i, rows_R, features_RD in parts:
            total_BD = total_BD.to(features_RD.dtype)
            weighted_RD = features_RD * weights_BE[rows_R, i, None].to(features_RD.dtype)
            total_BD = total_BD.index_add(0, rows_R, weighted_RD)
        return (_linear(self.linear, total_BD, casts).float() + self.linear.bias).relu()


#: How features become one vector.
AGGREGATIONS: dict[str, type[Concat] | type[Sum]] = {"concat": Concat, "sum": Sum}


def _linear(layer: nn.Module, features_RD: Tensor, casts: Casts | None) -> Tensor:
    """The layer without its bias, in the format of the features."""
    weight, dtype = layer.weight, features_RD.dtype
    assert isinstance(weight, Tensor)
    return F.linear(features_RD, casts.weight(weight, dtype) if casts else weight.to(dtype))
