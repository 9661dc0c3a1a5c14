"""Losses, gradients and weights that are NaN or infinite: noticed at once, and named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

#: How often a run has gone back to its last checkpoint.
Rollbacks = Annotated[int, Field(ge=0, le=1000)]
#: Of the learning rate, each time.
ROLLBACK_SCALE = 0.5


class NotFiniteError(Exception):
    """A number is NaN or infinite, or an update would have made weights so."""


def advice(learning_rate: str) -> str:
    """
    What a user does whose run has stopped at such a number.

    :param learning_rate: its key in the configuration
    """
    return (
        f"what was saved before is whole: train anew with a lower {learning_rate}, or raise "
        "train.n_rollbacks"
    )


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """One answer for all, for which a GPU is waited for once."""
    return bool(torch.isfinite(nn.utils.get_total_norm(tensors)))


def first_not_finite(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """
    Name of the first tensor that is not finite, and what it holds: ``NaN`` or ``infinity``.

    :param tensors: by name; in order
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            return name, "NaN" if torch.isnan(tensor).any() else "infinity"
    return None
