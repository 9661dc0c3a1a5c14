"""Losses and combinations of the tasks, by hand and against torch and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from vision_tasks.tasks import Classification, Landmarks

EYES = Landmarks(3, ((1,), (2,)))


def test_cross_entropy_of_each_image_by_hand() -> None:
    outputs_BC = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    losses_B = Classification(2).losses(outputs_BC, torch.tensor([0, 1]))
    torch.testing.assert_close(losses_B, torch.tensor([math.log(2.0), math.log(4.0)]))


def test_models_are_combined_by_their_mean_probability() -> None:
    outputs_MBC = np.random.default_rng(0).normal(size=(3, 4, 5))
    combined_BC = Classification(5).combine(torch.from_numpy(outputs_MBC).float())
    expected_BC = np.log(softmax(outputs_MBC, axis=2).mean(axis=0))
    np.testing.assert_allclose(combined_BC.numpy(), expected_BC, rtol=1e-5)


def test_imitation_is_the_softened_divergence() -> None:
    """Of Hinton et al. 2015: temperature 4, times its square."""
    student_BC, teacher_BC = np.random.default_rng(1).normal(size=(2, 4, 5))
    losses_B = Classification(5).imitation_losses(
        torch.from_numpy(student_BC), torch.from_numpy(teacher_BC)
    )
    p, log_p = softmax(teacher_BC / 4, axis=1), log_softmax(teacher_BC / 4, axis=1)
    expected_B = 16 * (p * (log_p - log_softmax(student_BC / 4, axis=1))).sum(axis=1)
    np.testing.assert_allclose(losses_B.numpy(), expected_B, rtol=1e-6)


def test_a_teacher_gets_no_gradient() -> None:
    teacher_BO = torch.zeros(2, 6, requires_grad=True)
    student_BO = torch.ones(2, 6, requires_grad=True)
    for task in (Classification(6), EYES):
        (gradient,) = torch.autograd.grad(
            task.imitation_losses(student_BO, teacher_BO).sum(), teacher_BO, allow_unused=True
        )[:1]
        assert gradient is None


def test_landmark_losses_are_hundredths_of_the_side() -> None:
    targets_BP2 = torch.zeros(1, 3, 2)
    outputs_BO = torch.tensor([[0.03, 0.0, 0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(EYES.losses(outputs_BO, targets_BP2), torch.tensor([0.5]))


def test_landmark_scores_by_hand() -> None:
    """Eyes are 0.4 apart; one image is off by 0.02 at each point, the other by 0.08."""
    targets_BP2 = torch.tensor([[[0.5, 0.5], [0.3, 0.4], [0.7, 0.4]]] * 2)
    outputs_BO = (targets_BP2 + torch.tensor([0.02, 0.08]).view(2, 1, 1) / math.sqrt(2)).flatten(1)
    scores = EYES.scores(outputs_BO, targets_BP2)
    assert scores["nme"] == pytest.approx((0.05 + 0.2) / 2, rel=1e-4)
    assert scores["failure_rate"] == 0.5
    assert scores["loss"] == pytest.approx(100 * 0.05 / math.sqrt(2), rel=1e-4)
