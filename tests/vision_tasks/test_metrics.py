"""Scores of image tasks: by hand, and against scipy where it has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from vision_tasks.metrics import (
    accuracy,
    area_under_error_curve,
    failure_rate,
    mean_over_seeds,
    normalised_mean_error,
    paired_difference,
)


def test_accuracy_is_the_share_of_largest_outputs() -> None:
    outputs_BC = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [-1.0, -2.0]])
    assert accuracy(outputs_BC, torch.tensor([1, 1, 1, 0])) == 0.75


def test_errors_are_over_the_distance_of_the_eyes() -> None:
    """The eyes' means are 4 apart; the points are 3, 4, 0, 0 and 5 away."""
    targets_BP2 = torch.tensor([[[0.0, 0], [2, 0], [5, 0], [5, 0], [3, 3]]])
    moved_BP2 = torch.tensor([[[3.0, 0], [0, 4], [0, 0], [0, 0], [3, -4]]])
    (error,) = normalised_mean_error(targets_BP2 + moved_BP2, targets_BP2, ((0, 1), (2, 3)))
    distances = [3, 4, 0, 0, 5]
    assert float(error) == pytest.approx(sum(distances) / 5 / 4)


def test_errors_need_no_unit() -> None:
    torch.manual_seed(0)
    points_BP2, targets_BP2 = torch.rand(2, 7, 5, 2)
    errors_B = normalised_mean_error(points_BP2, targets_BP2, ((0,), (1,)))
    larger_B = normalised_mean_error(128 * points_BP2 + 5, 128 * targets_BP2 + 5, ((0,), (1,)))
    torch.testing.assert_close(errors_B, larger_B, rtol=1e-4, atol=0)


def test_errors_refuse_what_has_none() -> None:
    with pytest.raises(ValueError, match=r"points are \(1, 3, 2\), but targets \(1, 4, 2\)"):
        normalised_mean_error(torch.rand(1, 3, 2), torch.rand(1, 4, 2), ((0,), (1,)))
    targets_BP2 = torch.rand(2, 3, 2)
    targets_BP2[1, 0] = targets_BP2[1, 1]
    with pytest.raises(ValueError, match="both eyes of face 1 are at one place"):
        normalised_mean_error(targets_BP2, targets_BP2, ((0,), (1,)))


def test_failures_are_above_a_tenth() -> None:
    assert failure_rate(torch.tensor([0.05, 0.0999, 0.1001, 0.5])) == 0.5


def test_area_under_the_error_curve_by_hand() -> None:
    """One face of two is found at 0.02, the other beyond 0.10: half for four fifths of the way."""
    assert area_under_error_curve(torch.tensor([0.02, 0.3])) == pytest.approx(0.5 * 0.8)
    assert area_under_error_curve(torch.zeros(3)) == 1.0


def test_area_under_the_error_curve_is_the_integral() -> None:
    errors_B = torch.tensor(np.random.default_rng(0).gamma(2, 0.03, 500))
    grid = np.linspace(0, 0.1, 20_001)
    shares = stats.ecdf(errors_B.numpy()).cdf.evaluate(grid)
    expected = np.trapezoid(shares, grid) / 0.1
    assert area_under_error_curve(errors_B) == pytest.approx(expected, abs=1e-4)


def test_interval_over_seeds_is_students() -> None:
    scores = [0.81, 0.83, 0.80, 0.86, 0.84]
    found = mean_over_seeds(scores)
    expected = stats.ttest_1samp(scores, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(0.828)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    # By hand: two numbers 2 apart have a standard error of 1, and t is 12.706.
    assert mean_over_seeds([1.0, 3.0]).high == pytest.approx(2 + 12.706, abs=1e-3)


def test_one_seed_has_no_interval() -> None:
    assert mean_over_seeds([0.5]) == (0.5, None, None)


def test_paired_difference_is_of_equal_seeds() -> None:
    ours, theirs = [0.81, 0.83, 0.80], [0.80, 0.81, 0.77]
    found = paired_difference(ours, theirs)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.mean == pytest.approx(0.02)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_means_refuse_scores_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="one for each seed"):
        mean_over_seeds([])
    with pytest.raises(ValueError, match="2 scores can't be paired with 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
