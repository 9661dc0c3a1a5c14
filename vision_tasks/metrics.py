"""Scores of image tasks, and their intervals over seeds: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Shape letters: B batch, C classes, P points, T thresholds.

#: Of a face's error, above which it counts as a failure (Sagonas et al. 2013, 300-W).
FAILURE = 0.10


def accuracy(outputs_BC: Tensor, targets_B: Tensor) -> float:
    """Share of images whose largest logit is that of the target class."""
    return float((outputs_BC.argmax(dim=1) == targets_B).float().mean())


def normalised_mean_error(
    points_BP2: Tensor, targets_BP2: Tensor, eyes: tuple[Sequence[int], Sequence[int]]
) -> Tensor:
    """
    Mean distance of the points over the inter-ocular distance, for each face, (B,).

    :param points_BP2: predicted points, x and y in any unit
    :param targets_BP2: true points in the same unit
    :param eyes: indices of the points whose mean is the one and the other eye
    """
    left_B2, right_B2 = (targets_BP2[:, list(eye)].mean(dim=1) for eye in eyes)
    distances_BP = (points_BP2 - targets_BP2).norm(dim=2)
    errors_B: Tensor = distances_BP.mean(dim=1) / (left_B2 - right_B2).norm(dim=1)
    return errors_B


def failure_rate(errors_B: Tensor, threshold: float = FAILURE) -> float:
    """Share of faces whose normalised mean error is above the threshold."""
    return float((errors_B > threshold).float().mean())


def area_under_error_curve(errors_B: Tensor, threshold: float = FAILURE) -> float:
    """
    Area under the cumulative distribution of errors up to the threshold, over the threshold: 0..1.

    The distribution is a step function, so the area is exact: a face with error e below the
    threshold counts ``1 - e / threshold``.
    """
    return float((1 - errors_B / threshold).clamp(min=0).mean())


class Interval(NamedTuple):
    """A mean over seeds and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """
    Mean with Student's t interval of 95 %; of a single value the interval is that value.
    """
    n, values_N = len(values), torch.tensor(values, dtype=torch.float64)
    mean = float(values_N.mean())
    if n == 1:
        return Interval(mean, mean, mean)
    half = _t_quantile(n - 1) * float(values_N.std()) / n**0.5
    return Interval(mean, mean - half, mean + half)


def paired_interval(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Mean of the differences, seed by seed, with the interval of ``mean_interval``."""
    return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])


#: 97.5 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _t_quantile(degrees: int) -> float:
    """Beyond 10 degrees of freedom an expansion in their inverse, right to three digits."""
    if degrees <= len(T_QUANTILES):
        return T_QUANTILES[degrees - 1]
    z = 1.959964
    first = (z**3 + z) / (4 * degrees)
    return z + first + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
