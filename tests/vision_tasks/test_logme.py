"""LogME against direct maximisation of the evidence, and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

from vision_tasks.logme import logme, regression_targets


def maximum_evidence(features: np.ndarray, targets: np.ndarray) -> float:
    """The largest log density of the targets under N(0, I / beta + F F' / alpha)."""
    n = len(features)

    def minus_evidence(logs: np.ndarray) -> float:
        alpha, beta = np.exp(logs)
        covariance = np.eye(n) / beta + features @ features.T / alpha
        return -multivariate_normal.logpdf(targets, np.zeros(n), covariance)

    starts = ((-2.0, 0.0), (3.0, 0.0))
    return -min(minimize(minus_evidence, start, method="Nelder-Mead").fun for start in starts)


@pytest.mark.parametrize(("n", "d"), [(25, 4), (12, 12), (10, 20)])
def test_it_is_the_largest_evidence(n: int, d: int) -> None:
    generator = np.random.default_rng(n)
    features = generator.normal(size=(n, d)) @ generator.normal(size=(d, d))
    noise = generator.normal(size=(n, 2))
    targets = features @ generator.normal(size=(d, 2)) + 2.0 * noise
    expected = np.mean([maximum_evidence(features, y) for y in targets.T]) / n
    found = logme(torch.from_numpy(features), torch.from_numpy(targets))
    assert found == pytest.approx(expected, abs=1e-4)


def test_one_feature_by_hand() -> None:
    """
    Its covariance is diag(1/beta + 1/alpha, 1/beta), at its best the squared targets: 4 and 1.
    """
    found = logme(torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0], [1.0]]))
    assert found == pytest.approx((-math.log(2 * math.pi) - math.log(2) - 1) / 2, abs=1e-5)


def test_features_that_tell_the_classes_rank_higher() -> None:
    generator = torch.Generator().manual_seed(0)
    classes_N = torch.randint(0, 3, (60,), generator=generator)
    targets_NO = regression_targets(classes_N, 4)  # one class has no image
    noise_ND = torch.randn(60, 8, generator=generator)
    telling_ND = torch.cat([noise_ND[:, :5], targets_NO[:, :3]], dim=1)
    assert logme(telling_ND, targets_NO) > logme(noise_ND, targets_NO) + 0.5
    assert math.isfinite(logme(torch.zeros(60, 8), targets_NO))


def test_regression_targets() -> None:
    classes = regression_targets(torch.tensor([2, 0]), 3)
    assert classes.tolist() == [[0, 0, 1], [1, 0, 0]]
    points = torch.arange(12.0).view(2, 3, 2)
    assert regression_targets(points, 6).tolist() == points.view(2, 6).tolist()


def test_features_and_targets_of_different_images() -> None:
    with pytest.raises(ValueError, match=r"features_ND has 3 images, but targets_NO 2: give both"):
        logme(torch.zeros(3, 1), torch.zeros(2, 1))
