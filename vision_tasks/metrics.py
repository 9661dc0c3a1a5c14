"""Scores of image tasks, and their means over seeds with intervals: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

# Shape letters: B images, C classes, P points.

#: Share of the inter-ocular distance above which a face counts as missed.
FAILURE = 0.10
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean over seeds with its 95 % interval; without one where there is a single seed."""

    mean: float
    low: float | None
    high: float | None


def accuracy(outputs_BC: Tensor, classes_B: Tensor) -> float:
    """
    Share of the images whose largest output is that of their class, 0..1.

    :param outputs_BC: logits or probabilities
    :param classes_B: int64
    """
    return float((outputs_BC.argmax(dim=1) == classes_B).double().mean())


def normalised_mean_error(
    points_BP2: Tensor, targets_BP2: Tensor, eyes: tuple[Sequence[int], Sequence[int]]
) -> Tensor:
    """
    Mean distance of each face's points from where they are, over its inter-ocular distance, (B,).

    :param points_BP2: found points, in any unit
    :param targets_BP2: true points, in the same unit
    :param eyes: two lists of points; the distance is that between the means of their true places
    :raises ValueError: if the shapes differ, or a face's eyes lie at one place
    """
    if points_BP2.shape != targets_BP2.shape:
        raise ValueError(
            f"points are {tuple(points_BP2.shape)}, but targets {tuple(targets_BP2.shape)}"
        )
    left_B2, right_B2 = (targets_BP2[:, list(eye)].mean(dim=1) for eye in eyes)
    eye_distances_B = (left_B2 - right_B2).norm(dim=1)
    if (eye_distances_B == 0).any():
        row = int((eye_distances_B == 0).nonzero()[0])
        raise ValueError(f"both eyes of face {row} are at one place: correct its annotation")
    errors_B: Tensor = (points_BP2 - targets_BP2).norm(dim=2).mean(dim=1) / eye_distances_B
    return errors_B


def failure_rate(errors_B: Tensor) -> float:
    """
    Share of the faces with a larger error than ``FAILURE``, 0..1.

    :param errors_B: normalised mean errors
    """
    return float((errors_B > FAILURE).double().mean())


def area_under_error_curve(errors_B: Tensor) -> float:
    """
    Area under the share of faces up to an error, for errors up to ``FAILURE``, 0..1.

    The share is a step function, whose area is computed exactly: a face with the error e adds
    max(0, 1 - e / FAILURE). Benchmarks that sample the curve at 1,000 places or join its steps
    by lines differ in the third digit.

    :param errors_B: normalised mean errors
    """
    return float((1 - errors_B.double() / FAILURE).clamp_min(0).mean())


def mean_over_seeds(scores: ArrayLike) -> Interval:
    """
    Mean and 95 % interval by Student's t distribution.

    :param scores: one for each seed
    :raises ValueError: if there are none
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"scores have the shape {values.shape}, but one for each seed is needed")
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Interval(mean, None, None)
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1) * values.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def paired_difference(scores: ArrayLike, others: ArrayLike) -> Interval:
    """
    Mean and 95 % interval of the differences of two methods' scores at equal seeds.

    :param scores: of a method, one for each seed
    :param others: of the method that it is compared with, at the same seeds in the same order
    :raises ValueError: if the numbers of seeds differ
    """
    ours, theirs = np.asarray(scores, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{ours.size} scores can't be paired with {theirs.size}: both need the same seeds"
        )
    return mean_over_seeds(ours - theirs)
