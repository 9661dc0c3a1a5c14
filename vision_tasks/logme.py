"""LogME: how well a Bayesian linear model explains targets by features, without held-out images."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Shape letters: N images, D features, O outputs.

MAX_ITERATIONS = 100
#: Change of an image's evidence, in nats, below which the iteration ends.
TOLERANCE = 1e-7
#: A squared singular value below this share of the largest is rounding.
SMALLEST = 1e-12
TINY = 1e-30


def logme(features_ND: Tensor, targets_NO: Tensor) -> float:
    """
    Logarithm of the maximum evidence of targets given features, for each image, in nats.

    Each output is ``F m + noise`` with ``m ~ N(0, I / alpha)`` and ``noise ~ N(0, I / beta)``. The
    evidence ``p(y | F)`` is maximised over alpha and beta by MacKay's fixed point, and averaged
    over the outputs (You et al., ICML 2021, arXiv 2102.11005: one-hot classes, or the outputs of a
    regression). As there, no intercept is added.

    :param features_ND: of a pretrained encoder
    :param targets_NO: numbers, such as one-hot classes; outputs that are 0 everywhere don't count
    :return: the higher, the better
    :raises ValueError: if the numbers of images differ
    """
    if len(features_ND) != len(targets_NO):
        raise ValueError(
            f"features_ND has {len(features_ND)} images, but targets_NO {len(targets_NO)}: give "
            "both for the same images"
        )
    features_ND, targets_NO = features_ND.double(), targets_NO.double()
    targets_NO = targets_NO[:, targets_NO.abs().sum(dim=0) > 0]
    squares_D, axes_DD = torch.linalg.eigh(features_ND.T @ features_ND)
    is_real_D = squares_D > SMALLEST * squares_D.max()
    squares_R, axes_DR = squares_D[is_real_D], axes_DD[:, is_real_D]
    projected_RO = (axes_DR.T @ (features_ND.T @ targets_NO)).square()
    evidence_O = _maximum_evidence(
        squares_R[:, None], projected_RO, targets_NO.square().sum(dim=0), len(targets_NO)
    )
    return float(evidence_O.mean()) / len(targets_NO)


def regression_targets(targets_B: Tensor, n_outputs: int) -> Tensor:
    """
    What ``logme`` takes as targets, (B, O): classes as one-hot vectors, numbers as they are.

    :param targets_B: int64 classes (B,), or floats (B, ...)
    :param n_outputs: O
    """
    if targets_B.is_floating_point():
        return targets_B.flatten(1)
    return F.one_hot(targets_B, n_outputs)


def _maximum_evidence(squares_R1: Tensor, projected_RO: Tensor, norms_O: Tensor, n: int) -> Tensor:
    """
    :param squares_R1: squared singular values of the features that are not 0, R of them
    :param projected_RO: ``(V' F' y)^2``, with the right singular vectors V
    :param norms_O: ``y' y``
    """
    alpha_O, beta_O = torch.ones_like(norms_O), torch.ones_like(norms_O)
    evidence_O = torch.full_like(norms_O, -math.inf)
    for _ in range(MAX_ITERATIONS):
        precisions_RO = alpha_O + beta_O * squares_R1
        means_RO = projected_RO / precisions_RO.square()
        length_O = beta_O.square() * means_RO.sum(dim=0)
        product_O = beta_O * (projected_RO / precisions_RO).sum(dim=0)
        fitted_O = beta_O.square() * (squares_R1 * means_RO).sum(dim=0)
        residual_O = (norms_O - 2 * product_O + fitted_O).maximum(SMALLEST * norms_O)
        before_O, evidence_O = (
            evidence_O,
            0.5
            * (
                n * (beta_O / (2 * math.pi)).log()
                - beta_O * residual_O
                - alpha_O * length_O
                - torch.log1p(beta_O / alpha_O * squares_R1).sum(dim=0)
            ),
        )
        if ((evidence_O - before_O).abs() < TOLERANCE * n).all():
            break
        known_O = (beta_O * squares_R1 / precisions_RO).sum(dim=0)
        alpha_O = known_O.clamp_min(TINY) / length_O.clamp_min(TINY)
        beta_O = (n - known_O).clamp_min(TINY) / residual_O
    return evidence_O
