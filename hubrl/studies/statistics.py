"""
Statistics over repeated runs: curves, aggregates, bootstrap intervals; pure functions of numbers.

The arithmetic is that of rliable: Agarwal, Schwarzer, Castro, Courville, Bellemare: "Deep
Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS 2021, arXiv 2108.13264.
Jump-start and time to threshold are those of Taylor and Stone: "Transfer Learning for Reinforcement
Learning Domains: A Survey", JMLR 10, 2009.

Scores come as strata: one array for each game, whose last axis runs over seeds. A statistic of
strata reduces that last axis and leaves the axes before it, so that one call handles all bootstrap
resamples, and all points of a curve. Shape letters: S seeds, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Strata = Sequence[Floats]

N_RESAMPLES = 10_000
QUANTILES = (0.025, 0.975)


class Estimate(NamedTuple):
    """A number with its 95 % interval; without one where a game has a single seed."""

    value: float
    low: float | None = None
    high: float | None = None


class Band(NamedTuple):
    """The same for all points of a curve: arrays of equal shape."""

    value: Floats
    low: Floats | None = None
    high: Floats | None = None


def learning_curve(x: ArrayLike, returns: ArrayLike, grid: ArrayLike, window: float) -> Floats:
    """
    The return while learning, on a common grid.

    A point is the mean return of the games that ended within the last ``window``. Where none did,
    it is the last game's return; before the first end, the first game's.

    :param x: (games,) when each game ended, in steps or seconds, increasing
    :param returns: (games,) return of each
    :param grid: (points,) increasing
    :param window: in the unit of ``x``
    :raises ValueError: if no game ended by the grid's end
    """
    x, returns, grid = (np.asarray(a, dtype=np.float64) for a in (x, returns, grid))
    if not len(x) or x[0] > grid[-1]:
        raise ValueError(f"no game ended within {grid[-1]:g}, but a curve needs at least 1")
    last = np.maximum(np.searchsorted(x, grid, side="right"), 1)
    first = np.minimum(np.searchsorted(x, grid - window, side="right"), last - 1)
    sums = np.concatenate([[0.0], np.cumsum(returns)])
    means: Floats = (sums[last] - sums[first]) / (last - first)
    return means


def time_to_threshold(
    grid: ArrayLike, curve: ArrayLike, threshold: float, first_end: float = 0.0
) -> float:
    """
    The first grid point whose value is at least the threshold; infinity if there is none.

    :param first_end: when the first game ended; before it nothing was reached
    """
    grid = np.asarray(grid, dtype=np.float64)
    reached = np.flatnonzero((np.asarray(curve) >= threshold) & (grid >= first_end))
    return float(grid[reached[0]]) if len(reached) else np.inf


def mean(strata: Strata) -> Floats:
    """Mean over all games' seeds."""
    pooled: Floats = np.concatenate(strata, axis=-1).mean(axis=-1)
    return pooled


def interquartile_mean(strata: Strata) -> Floats:
    """
    Mean of the middle half of all games' seeds (Agarwal et al. 2021, section 4.3).

    As ``scipy.stats.trim_mean(..., 0.25)``: a quarter, rounded down, is cut from each side. NaN if
    a score is.
    """
    pooled = np.sort(np.concatenate(strata, axis=-1), axis=-1)
    n = pooled.shape[-1]
    return _unless_unknown(pooled[..., n // 4 : n - n // 4].mean(axis=-1), pooled)


def median(strata: Strata) -> Floats:
    """
    The upper median, so that infinity (a threshold that was never reached) has its place.

    It is infinite where half of the runs never came, and NaN if a score is.
    """
    pooled = np.sort(np.concatenate(strata, axis=-1), axis=-1)
    return _unless_unknown(pooled[..., pooled.shape[-1] // 2], pooled)


def mean_ratio(strata: Strata, control: Strata) -> Floats:
    """Mean divided by the control's; as ``quotient`` where that is 0 or less."""
    return quotient(mean(strata), mean(control))


def interquartile_ratio(strata: Strata, control: Strata) -> Floats:
    """Interquartile mean divided by the control's; as ``quotient`` where that is 0 or less."""
    return quotient(interquartile_mean(strata), interquartile_mean(control))


def quotient(scores: Floats, controls: Floats) -> Floats:
    """
    Scores in units of the control's.

    A control of 0 or less is no unit: what is above 0 is infinitely many of it, the rest unknown
    (NaN).
    """
    unit = np.where(controls > 0, controls, np.nan)
    without = np.where(scores > 0, np.inf, np.nan)
    return np.where(controls > 0, scores / unit, without)


def difference(strata: Strata, control: Strata) -> Floats:
    """Mean minus the control's."""
    return mean(strata) - mean(control)


def probability_of_improvement(strata: Strata, control: Strata) -> Floats:
    """
    P(a random seed's score is above a random one of the control), averaged over games.

    Agarwal et al. 2021, section 4.3: the Mann-Whitney U statistic over the number of pairs; equal
    scores count half.
    """
    games = []
    for scores_S, others_S in zip(strata, control, strict=True):
        scores, others = scores_S[..., :, None], others_S[..., None, :]
        games.append(((scores > others) + 0.5 * (scores == others)).mean(axis=(-2, -1)))
    average: Floats = np.mean(games, axis=0)
    return average


def estimate(
    statistic: Callable[..., Floats], *groups: Strata, n_resamples: int = N_RESAMPLES
) -> Estimate:
    """
    A statistic with its 95 % percentile interval by the stratified bootstrap.

    Seeds are drawn with replacement within each game and each group (Agarwal et al. 2021, section
    4.1). The draws are always the same ones.

    :param statistic: takes the groups' strata
    :param groups: strata of (S,) arrays: the scores of a variant, of the control ...
    """
    value, low, high = band(statistic, *groups, n_resamples=n_resamples)
    if low is None or high is None:
        return Estimate(float(value))
    return Estimate(float(value), float(low), float(high))


def band(statistic: Callable[..., Floats], *groups: Strata, n_resamples: int = N_RESAMPLES) -> Band:
    """``estimate`` for each point of a curve: strata of (points, S) arrays."""
    value = np.asarray(statistic(*groups))
    if min(scores.shape[-1] for strata in groups for scores in strata) < 2:
        return Band(value)
    generator = np.random.default_rng(0)
    resampled = [[_resample(s, n_resamples, generator) for s in strata] for strata in groups]
    # Not interpolated, for between a number and infinity there is nothing.
    low, high = np.quantile(statistic(*resampled), QUANTILES, axis=-1, method="inverted_cdf")
    return Band(value, low, high)


def _unless_unknown(middle: Floats, pooled: Floats) -> Floats:
    """NaN, which sorting puts last, is no score above all others."""
    return np.where(np.isnan(pooled[..., -1]), np.nan, middle)


def _resample(scores: Floats, n_resamples: int, generator: np.random.Generator) -> Floats:
    """(..., S) -> (..., R, S); all points of a curve share a resample's seeds."""
    n = scores.shape[-1]
    chosen: Floats = scores[..., generator.integers(n, size=(n_resamples, n))]
    return chosen
