"""Statistics against hand-worked numbers, scipy, and numbers that rliable 1.2.0 printed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from hubrl.studies import statistics
from hubrl.studies.statistics import Estimate, Floats, band, estimate

INF = np.inf
#: 6 seeds of 3 games, and of a control.
SCORES = np.array(
    [
        [1.301, 1.449, 1.163],
        [0.855, 1.073, 0.804],
        [1.33, 1.97, 1.054],
        [0.99, 1.545, 1.478],
        [1.353, 0.835, 1.285],
        [1.648, 0.628, 1.071],
    ]
)
CONTROL = np.array(
    [
        [0.24, 0.484, 0.263],
        [0.906, 0.493, 1.109],
        [1.063, 0.925, -0.007],
        [0.785, 0.981, 1.045],
        [0.388, 0.809, 0.609],
        [0.676, 1.424, 0.677],
    ]
)
numbers = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=13).map(np.array)


def strata(matrix: Floats) -> list[Floats]:
    return list(matrix.T)


def test_learning_curve_by_hand() -> None:
    # Windows (0, 10], (5, 15], (10, 20], (15, 25], (20, 30].
    x, returns = [4, 8, 12, 12, 30], [1.0, 3.0, 5.0, 9.0, 2.0]
    curve = statistics.learning_curve(x, returns, [10, 15, 20, 25, 30], window=10)
    assert curve.tolist() == [2.0, (3 + 5 + 9) / 3, 7.0, 9.0, 2.0]


def test_learning_curve_before_the_first_end() -> None:
    assert statistics.learning_curve([7, 9], [3, 5], [2, 4, 8, 10], 2).tolist() == [3, 3, 3, 5]


@pytest.mark.parametrize("x", [[], [11.0, 12.0]])
def test_learning_curve_without_a_game(x: list[float]) -> None:
    with pytest.raises(ValueError, match="no game ended within 10, but a curve needs at least 1"):
        statistics.learning_curve(x, x, [5, 10], 5)


def test_time_to_threshold() -> None:
    grid, curve = [10, 20, 30, 40], [1.0, 3.0, 2.0, 4.0]
    times = [statistics.time_to_threshold(grid, curve, level) for level in (0.5, 2.5, 3.5, 4.5)]
    assert times == [10, 20, 40, INF]
    # A curve has its first game's return before that game ended.
    assert statistics.time_to_threshold(grid, [3.0, 3.0, 2.0, 4.0], 3, first_end=25) == 40


@given(numbers)
def test_interquartile_mean_is_scipys_trimmed_mean(scores: Floats) -> None:
    ours = statistics.interquartile_mean([scores])
    assert ours == pytest.approx(scipy.stats.trim_mean(scores, 0.25), abs=1e-9)


def test_interquartile_mean_pools_games() -> None:
    # 1 2 | 3 4 5 6 | 7 100
    games = [np.array([100.0, 1, 3]), np.array([2.0, 4, 5, 6, 7])]
    assert statistics.interquartile_mean(games) == 4.5


def test_median_is_the_upper_one_and_knows_infinity() -> None:
    assert statistics.median([np.array([3.0, 1, INF, 2])]) == 3
    assert statistics.median([np.array([INF, 1])]) == INF
    assert statistics.median([np.array([3.0, 1, INF])]) == 3
    assert statistics.median([np.array([INF, 1, INF])]) == INF


@pytest.mark.parametrize("statistic", [statistics.interquartile_mean, statistics.median])
def test_an_unknown_score_is_not_the_best_one(statistic: Any) -> None:
    strata = [np.array([10.0, 20, 30, np.nan]), np.array([10.0, 20, 30, 10])]
    assert np.isnan(statistic(strata))
    found = statistics.estimate(statistic, strata)
    assert np.isnan([found.value, found.low, found.high]).all()


@given(numbers, numbers)
def test_probability_of_improvement_is_mann_whitneys_u(scores: Floats, control: Floats) -> None:
    u = scipy.stats.mannwhitneyu(scores, control, method="asymptotic").statistic
    ours = statistics.probability_of_improvement([scores], [control])
    assert ours == pytest.approx(u / (len(scores) * len(control)))


def test_probability_of_improvement_by_hand() -> None:
    # 1 > 0, 1 = 1, 3 > 0, 3 > 1: 3.5 of 4; the other game: 0 of 1.
    scores = [np.array([1.0, 3.0]), np.array([0.0])]
    control = [np.array([0.0, 1.0]), np.array([2.0])]
    assert statistics.probability_of_improvement(scores, control) == (3.5 / 4 + 0) / 2


def test_ratio_and_difference_by_hand() -> None:
    scores, control = [np.array([4.0, 8.0])], [np.array([1.0, 2.0])]
    assert statistics.mean_ratio(scores, control) == 4
    assert statistics.difference(scores, control) == 4.5
    scores, control = [np.array([1.0, 1, 1, 1, 16])], [np.array([2.0, 2, 2, 2, 2])]
    assert statistics.mean_ratio(scores, control) == 2
    assert statistics.interquartile_ratio(scores, control) == 0.5


def test_a_control_that_is_no_unit() -> None:
    # Resampled controls of mean 0 are 8 of 27: more than 2.5 %.
    control = [np.array([0.0, 0, 3])]
    assert estimate(statistics.mean_ratio, [np.array([1.0, 2, 3])], control) == (2, 2 / 3, INF)
    value, low, high = estimate(statistics.mean_ratio, [np.array([0.0, 0, 1])], control)
    assert value == 1 / 3
    assert np.isnan([low, high]).all()
    below = [np.array([-0.3, -0.2, 2])]
    assert estimate(statistics.mean_ratio, [np.array([1.0, 2, 3])], below) == (4, 1, INF)


def test_rliables_interquartile_mean_with_its_interval() -> None:
    found = estimate(statistics.interquartile_mean, strata(SCORES))
    assert found.value == pytest.approx(1.2069)
    assert (found.low, found.high) == pytest.approx((1.0289, 1.3661), abs=0.01)
    control = estimate(statistics.interquartile_mean, strata(CONTROL))
    assert control.value == pytest.approx(0.7345)


def test_rliables_probability_of_improvement_with_its_interval() -> None:
    found = estimate(statistics.probability_of_improvement, strata(SCORES), strata(CONTROL))
    assert found.value == pytest.approx(0.861111, abs=1e-6)
    assert (found.low, found.high) == pytest.approx((0.7222, 0.9630), abs=0.01)


def test_scipys_bootstrap_of_a_difference() -> None:
    a, b = SCORES[:, 0], CONTROL[:, 0]
    reference = scipy.stats.bootstrap(
        (a, b),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(5),
    ).confidence_interval
    found = estimate(statistics.difference, [a], [b])
    assert found.low == pytest.approx(reference.low, abs=0.02)
    assert found.high == pytest.approx(reference.high, abs=0.02)


def test_the_same_numbers_every_time() -> None:
    assert estimate(statistics.mean, strata(SCORES)) == estimate(statistics.mean, strata(SCORES))


def test_one_seed_has_no_interval() -> None:
    games = [np.array([1.0, 2.0]), np.array([3.0])]
    assert estimate(statistics.mean, games) == Estimate(2.0, None, None)
    both = [np.array([1.0, 2.0])], [np.array([3.0])]
    assert estimate(statistics.difference, *both) == Estimate(-1.5, None, None)


def test_games_are_never_mixed_in_a_resample() -> None:
    # Within a game the seeds agree, so that there is nothing to vary.
    games = [np.array([0.0, 0.0]), np.array([100.0, 100.0])]
    assert estimate(statistics.mean, games) == (50, 50, 50)


def test_an_interval_reaches_infinity_without_a_nan() -> None:
    found = estimate(statistics.median, [np.array([10.0, 20.0, INF])])
    assert found == (20, 10, INF)


def test_a_band_is_the_estimate_of_each_point() -> None:
    curves_PS = SCORES.T
    whole = band(statistics.mean, [curves_PS])
    assert whole.low is not None
    assert whole.high is not None
    for i, scores in enumerate(curves_PS):
        alone = estimate(statistics.mean, [scores])
        assert (whole.value[i], whole.low[i], whole.high[i]) == pytest.approx(alone)
    assert band(statistics.mean, [curves_PS[:, :1]]).low is None
