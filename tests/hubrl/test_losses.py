"""Losses against numbers worked out by hand, and the attached loss against an explicit sum."""

import math

import pytest
import torch
from torch import nn

from hubrl.losses import attach_loss, pathway_exploration_loss


def test_exploration_loss_of_two_opposite_rows_is_minus_log_2() -> None:
    # Each row is certain, but the batch as a whole uses both encoders equally.
    probabilities = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert pathway_exploration_loss(probabilities).item() == pytest.approx(-math.log(2), abs=1e-7)


def test_exploration_loss_by_hand() -> None:
    # mean (0.75, 0.25): 0.75 ln 0.75 + 0.25 ln 0.25 = -0.215762 - 0.346574
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    assert pathway_exploration_loss(probabilities).item() == pytest.approx(-0.562335, abs=1e-6)


def test_exploration_loss_has_finite_gradient_where_the_softmax_underflows() -> None:
    scores = torch.tensor([[0.0, -300.0]], requires_grad=True)
    pathway_exploration_loss(scores.softmax(dim=1)).backward()
    assert torch.isfinite(scores.grad).all()


def test_attached_loss_gives_the_gradient_of_the_sum() -> None:
    torch.manual_seed(0)
    layer, auxiliary = nn.Linear(3, 2), nn.Linear(3, 1)
    inputs = torch.randn(5, 3)

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        features = layer(inputs)
        return features, 0.3 * (auxiliary(inputs) ** 2).mean() + 0.1 * (features**2).sum()

    features, loss = losses()
    (features.sin().sum() + loss).backward()
    parameters = [*layer.parameters(), *auxiliary.parameters()]
    expected = [parameter.grad.clone() for parameter in parameters]
    layer.zero_grad()
    auxiliary.zero_grad()
    features, loss = losses()
    attach_loss(features, loss).sin().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-7, rtol=0)


def test_attach_loss_returns_the_features_unchanged() -> None:
    features = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(attach_loss(features, features.sum()), features)
