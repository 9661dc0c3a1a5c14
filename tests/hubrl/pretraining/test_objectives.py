"""The self-supervised losses against numbers worked by hand or computed another way."""

import math

import pytest
import torch
from torch.nn import functional as F

from hubrl.pretraining import objectives


def test_info_nce_of_a_two_by_two_example():
    # Orthogonal unit vectors: cosines are the identity matrix, so that each row and each column
    # is log(e^2 + e^0) - 2 at temperature 0.5.
    vectors_GND = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    loss = objectives.info_nce(vectors_GND, 3 * vectors_GND, temperature=0.5)
    assert loss.item() == pytest.approx(math.log(math.exp(2) + 1) - 2, abs=1e-6)


def test_info_nce_is_the_cross_entropy_of_each_group_both_ways():
    generator = torch.Generator().manual_seed(0)
    queries_GND, keys_GND = torch.randn(2, 3, 5, 4, generator=generator)
    queries_GND, keys_GND = queries_GND.double(), keys_GND.double()
    expected = []
    for queries_ND, keys_ND in zip(queries_GND, keys_GND, strict=True):
        cosines_NN = F.cosine_similarity(queries_ND[:, None], keys_ND[None], dim=2)
        target_N = torch.arange(5)
        expected.append(F.cross_entropy(cosines_NN / 0.1, target_N))
        expected.append(F.cross_entropy(cosines_NN.T / 0.1, target_N))
    loss = objectives.info_nce(queries_GND, keys_GND, temperature=0.1)
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_info_nce_of_features_that_carry_nothing_is_log_n():
    same_GND = torch.ones(2, 7, 3)
    loss = objectives.info_nce(same_GND, same_GND, temperature=0.1)
    assert loss.item() == pytest.approx(math.log(7), abs=1e-6)


def test_standardise_is_batch_norm_of_each_game():
    generator = torch.Generator().manual_seed(0)
    values_TGND = 3 + 2 * torch.randn(2, 3, 5, 4, generator=generator)
    result_TGND = objectives.standardise(values_TGND)
    for game in range(3):
        rows_BD = values_TGND[:, game].reshape(10, 4)
        expected_BD = F.batch_norm(rows_BD, None, None, training=True, eps=1e-5)
        torch.testing.assert_close(result_TGND[:, game].reshape(10, 4), expected_BD)


def test_inverse_dynamics_loss_by_hand():
    logits_BA = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    loss = objectives.inverse_dynamics_loss(logits_BA, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, abs=1e-6)


def test_reconstruction_counts_only_hidden_pixels_by_their_weight():
    target = torch.zeros(1, 1, 2, 2)
    predicted = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    mask = torch.tensor([[[[True, True], [False, False]]]])
    weight = torch.tensor([[[[1.0, 3.0], [1.0, 1.0]]]])
    loss = objectives.masked_reconstruction_loss(predicted, target, mask, weight)
    assert loss.item() == pytest.approx((1 * 1 + 3 * 4) / 4)


def test_reconstruction_of_visible_pixels_has_no_gradient():
    predicted = torch.ones(1, 1, 2, 2, requires_grad=True)
    mask = torch.tensor([[[[True, False], [False, False]]]])
    loss = objectives.masked_reconstruction_loss(
        predicted, torch.zeros(1, 1, 2, 2), mask, torch.ones(1, 1, 2, 2)
    )
    loss.backward()
    assert predicted.grad is not None
    assert (predicted.grad != 0).equal(mask)


def test_reconstruction_of_nothing_hidden_is_zero():
    images = torch.rand(2, 1, 4, 4)
    nothing = torch.zeros_like(images, dtype=torch.bool)
    loss = objectives.masked_reconstruction_loss(
        images, 1 - images, nothing, torch.ones(2, 1, 4, 4)
    )
    assert loss.item() == 0.0


def test_two_hot_shares_a_value_out_between_its_neighbours():
    bins_Z = torch.tensor([-1.0, 0.0, 2.0])
    target_BZ = objectives.two_hot(torch.tensor([0.5, -1.0, 2.0, 9.0, 0.0]), bins_Z)
    expected_BZ = [[0, 0.75, 0.25], [1, 0, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0]]
    torch.testing.assert_close(target_BZ, torch.tensor(expected_BZ))


def test_return_prediction_loss_by_hand():
    bins_Z = torch.tensor([0.0, 1.0])
    logits_BZ = torch.tensor([[0.0, math.log(3.0)]])  # probabilities 1/4 and 3/4
    loss = objectives.return_prediction_loss(logits_BZ, torch.tensor([0.25]), bins_Z)
    assert loss.item() == pytest.approx(-(0.75 * math.log(0.25) + 0.25 * math.log(0.75)), abs=1e-6)


def test_discounted_returns_stop_at_the_end_of_an_episode():
    rewards_BT = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]])
    alive_BT = torch.tensor([[True, True, True], [True, True, False]])
    returns_B = objectives.discounted_returns(rewards_BT, alive_BT, discount=0.5)
    torch.testing.assert_close(returns_B, torch.tensor([3.0, 2.0]))


def test_random_shift_moves_pixels_and_repeats_the_border():
    image = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3)
    images = image.expand(3, 1, 3, 3).contiguous()
    shifted = objectives.random_shift(images, torch.tensor([[0, 0], [1, 0], [0, -2]]))
    assert shifted[0, 0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert shifted[1, 0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    assert shifted[2, 0].tolist() == [[2, 2, 2], [5, 5, 5], [8, 8, 8]]


def test_random_shift_agrees_with_padding_and_cropping():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 4, 20, 16), generator=generator, dtype=torch.uint8)
    shifts_B2 = torch.randint(-4, 5, (6, 2), generator=generator)
    shifted = objectives.random_shift(images, shifts_B2)
    padded = F.pad(images.float(), (4, 4, 4, 4), mode="replicate").to(torch.uint8)
    for b, (down, right) in enumerate(shifts_B2.tolist()):
        expected = padded[b, :, 4 - down : 24 - down, 4 - right : 20 - right]
        assert shifted[b].equal(expected)
    assert shifted.dtype == torch.uint8


def test_random_shift_by_nothing_is_a_copy():
    images = torch.randint(0, 256, (2, 4, 8, 8), dtype=torch.uint8)
    assert objectives.random_shift(images, torch.zeros(2, 2, dtype=torch.int64)).equal(images)


def test_patch_mask_hides_whole_patches():
    hidden_BCPQ = torch.tensor([[[[True, False]]]])
    mask = objectives.patch_mask(hidden_BCPQ, (2, 4))
    assert mask.tolist() == [[[[True, True, False, False]] * 2]]


def test_a_hidden_pixel_becomes_the_mean_of_the_frames_that_show_it():
    images = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    mask = torch.tensor([False, True, False]).view(1, 3, 1, 1)
    assert objectives.mean_of_visible(images, mask).flatten().tolist() == [1.0, 3.5, 6.0]
    hidden = torch.ones_like(mask)
    assert objectives.mean_of_visible(images, hidden).flatten().tolist() == [0.0, 0.0, 0.0]


def test_movement_weight_is_one_where_the_stack_changes():
    images = torch.zeros(1, 2, 1, 3)
    images[0, 0, 0, 1] = 0.5  # changes
    images[0, :, 0, 2] = 0.5  # stays
    weight = objectives.movement_weight(images, still=0.1)
    torch.testing.assert_close(weight, torch.tensor([[[[0.1, 1.0, 0.1]]] * 2]).view(1, 2, 1, 3))


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        objectives.info_nce(torch.ones(2, 3, 4), torch.ones(2, 3, 5), 0.1)
