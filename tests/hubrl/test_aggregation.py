"""Features in one scale: means and limits by hand, when they follow, and where they are kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hubrl.aggregation import Contribution, Standardised

# Shape letters: R rows, D features of one encoder.


class Raw(nn.Module):
    """Hands out the weighted features."""

    def forward(self, parts, weights_BE: Tensor, casts=None) -> Tensor:
        (part,) = parts
        return part.features_RD * weights_BE[part.rows_R, part.i, None].to(part.features_RD.dtype)


def standardised(module: Standardised, features_RD: Tensor, i: int = 0) -> Tensor:
    part = Contribution(i, torch.arange(len(features_RD)), features_RD)
    return module([part], torch.ones(len(features_RD), 2))


def learn(module: Standardised, *batches: Tensor, i: int = 0) -> None:
    """An update of some minibatches, after which the module is in evaluation mode."""
    module.train()
    for features_RD in batches:
        standardised(module, features_RD, i)
    module.eval()


def rows(n: int, seed: int = 0) -> Tensor:
    """Three features that differ in mean and deviation."""
    noise_RD = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return torch.tensor([5.0, -2.0, 0.0]) + noise_RD * torch.tensor([0.1, 0.2, 0.3])


@pytest.fixture
def module() -> Standardised:
    return Standardised(Raw(), [3, 3])


def test_the_first_rows_by_hand(module: Standardised) -> None:
    features_RD = rows(100)
    learn(module, features_RD)
    mean_D = features_RD.mean(dim=0)
    deviation = (features_RD - mean_D).square().mean(dim=1).median().sqrt()
    shared_D = deviation * mean_D / mean_D.square().mean().sqrt()  # as long as a deviation
    expected_RD = 0.25 * (features_RD - mean_D + shared_D) / deviation
    torch.testing.assert_close(standardised(module, features_RD), expected_RD)


def test_a_mean_that_is_shorter_than_a_deviation_stays(module: Standardised) -> None:
    features_RD = rows(100) - rows(100).mean(dim=0) + 0.01
    learn(module, features_RD)
    deviation = (features_RD - features_RD.mean(dim=0)).square().mean(dim=1).median().sqrt()
    torch.testing.assert_close(standardised(module, features_RD), 0.25 * features_RD / deviation)


def test_before_64_rows_nothing_changes(module: Standardised) -> None:
    learn(module, rows(40, seed=1))
    assert torch.equal(standardised(module, rows(9)), rows(9))
    learn(module, rows(24, seed=2))
    assert not torch.equal(standardised(module, rows(9)), rows(9))
    both_RD = torch.cat([rows(40, seed=1), rows(24, seed=2)])
    torch.testing.assert_close(module.running_mean_0, both_RD.mean(dim=0))


def test_an_update_begins_and_ends_with_the_means_of_its_rollout(module: Standardised) -> None:
    learn(module, rows(100))
    before_RD = standardised(module, rows(9))
    module.train()
    for seed in range(3):
        standardised(module, rows(50, seed=seed) + 0.05)
        assert torch.equal(standardised(module, rows(9)), before_RD)
    module.eval()
    assert not torch.equal(standardised(module, rows(9)), before_RD)


def test_means_follow_with_the_share_of_the_rows(module: Standardised) -> None:
    first_RD, later_RD = rows(100), rows(25) + 0.05
    learn(module, first_RD, later_RD)
    expected_D = (100 * first_RD.mean(dim=0) + 25 * later_RD.mean(dim=0)) / 125
    torch.testing.assert_close(module.running_mean_0, expected_D)
    assert module.running_rows_E.tolist() == [125, 0]
    module.running_rows_E[0] = module.MEMORY
    before_D = module.running_mean_0.clone()
    learn(module, later_RD)
    expected_D = before_D + 25 / 25_600 * (later_RD.mean(dim=0) - before_D)
    torch.testing.assert_close(module.running_mean_0, expected_D)


def test_rows_far_away_come_back_to_the_limit_and_count_in_no_mean(module: Standardised) -> None:
    learn(module, rows(100))
    module.SHARED = 0.0
    before_D = module.running_mean_0.clone()
    features_RD = torch.cat([rows(20, seed=1), 1000 * torch.ones(2, 3)])
    lengths_R = standardised(module, features_RD).square().mean(dim=1).sqrt()
    torch.testing.assert_close(lengths_R[20:], torch.tensor([1.0, 1.0]))  # 4 deviations of 0.25
    learn(module, features_RD)
    expected_D = (100 * before_D + features_RD[:20].sum(dim=0)) / 120
    torch.testing.assert_close(module.running_mean_0, expected_D)
    assert module.running_rows_E[0] == 120


def test_an_encoder_that_changed_is_followed(module: Standardised) -> None:
    learn(module, rows(100), *[rows(100_000) + 3 for _ in range(20)])
    expected_D = rows(100_000).mean(dim=0) + 3
    torch.testing.assert_close(module.running_mean_0, expected_D, atol=0.01, rtol=0)
    far_RD = standardised(module, rows(1000) + 3)
    apart_RD = far_RD - far_RD.mean(dim=0)
    assert float(apart_RD.square().mean(dim=1).median().sqrt()) == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("mode", ["evaluation", "no gradients"])
def test_nothing_follows_where_nothing_is_trained(mode: str, module: Standardised) -> None:
    learn(module, rows(100))
    module.SHARED = 0.0
    before = copy.deepcopy(module.state_dict())
    module.train(mode != "evaluation")
    with torch.set_grad_enabled(mode != "no gradients"):
        found_RD = standardised(module, rows(50, seed=3))
    module.eval()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    expected_RD = 0.25 * (rows(50, seed=3) - module.running_mean_0)
    torch.testing.assert_close(found_RD, expected_RD / module.running_variance_E[0].sqrt())


def test_encoders_have_means_of_their_own(module: Standardised) -> None:
    learn(module, rows(100))
    learn(module, 7 * rows(100, seed=2), i=1)
    torch.testing.assert_close(module.running_mean_1, 7 * rows(100, seed=2).mean(dim=0))
    torch.testing.assert_close(module.running_mean_0, rows(100).mean(dim=0))


def test_constant_features_stay_finite(module: Standardised) -> None:
    constant_RD = torch.full((100, 3), 0.7)
    learn(module, constant_RD, constant_RD)
    assert standardised(module, constant_RD).abs().max() < 1e-3


def test_most_rows_may_be_the_same(module: Standardised) -> None:
    """As where an agent waits; the median alone would fall to the noise of these."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        varied_RD = rows(160, seed=int(torch.randint(10_000, (), generator=generator)))
        same_RD = torch.tensor([[5.0, -2.0, 0.0]]).repeat(240, 1)
        learn(module, torch.cat([varied_RD, same_RD]))
    deviation = float(rows(10_000).var(dim=0).mean().sqrt())
    assert 0.25 * deviation < float(module.running_variance_E[0].sqrt()) < deviation
    expected_D = torch.tensor([5.0, -2.0, 0.0])
    torch.testing.assert_close(module.running_mean_0, expected_D, atol=0.03, rtol=0)


def test_gradients_reach_the_encoder(module: Standardised) -> None:
    learn(module, rows(100))
    features_RD = rows(10, seed=4).requires_grad_()
    standardised(module, features_RD).sum().backward()
    expected = 0.25 * module.running_variance_E[0].rsqrt()
    torch.testing.assert_close(features_RD.grad, expected.expand(10, 3))


def test_half_precision_stays(module: Standardised) -> None:
    learn(module, rows(100))
    assert standardised(module, rows(100).bfloat16()).dtype == torch.bfloat16


def test_rows_that_come_one_by_one_are_not_taken_for_their_own_mean(module: Standardised) -> None:
    learn(module, *rows(400).split(1))
    expected = float(rows(400).var(dim=0).mean())  # the median of one is its mean
    assert float(module.running_variance_E[0]) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_leave_the_means_as_they_are(
    value: float, is_first: bool, module: Standardised
) -> None:
    if not is_first:
        learn(module, rows(100))
    before = copy.deepcopy(module.state_dict())
    features_RD = rows(20)
    features_RD[3, 1] = value
    learn(module, features_RD, features_RD[3:4], features_RD[:0])
    assert all(torch.equal(number, before[key]) for key, number in module.state_dict().items())
