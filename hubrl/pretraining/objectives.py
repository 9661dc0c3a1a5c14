"""Losses of self-supervised pretraining, pure and unweighted, and the image functions they need."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Shape letters: B batch, G groups whose members are told apart, N members of a group, D features,
# A actions, C H W image, P Q rows and columns of patches, Z bins, T time steps or views.

#: A pixel's change, of 0 to 1, that is not noise.
MOVED = 0.02


def info_nce(queries_GND: Tensor, keys_GND: Tensor, temperature: float) -> Tensor:
    """
    Symmetric InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) on cosine similarities.

    Row n of a group's queries belongs to row n of its keys; the group's other rows are the
    negatives. Rows of other groups are not compared: telling games apart would be too easy.

    :param queries_GND: (G, N, D), N >= 2
    :param keys_GND: (G, N, D)
    :param temperature: divides the cosines
    :return: scalar, in nats; log(N) for features that carry nothing
    """
    assert queries_GND.shape == keys_GND.shape, (queries_GND.shape, keys_GND.shape)
    assert queries_GND.ndim == 3, queries_GND.shape
    queries_GND, keys_GND = F.normalize(queries_GND, dim=-1), F.normalize(keys_GND, dim=-1)
    logits_GNN = queries_GND @ keys_GND.transpose(1, 2) / temperature
    positives_GN = logits_GNN.diagonal(dim1=1, dim2=2)
    to_keys_GN = logits_GNN.logsumexp(dim=2) - positives_GN
    to_queries_GN = logits_GNN.logsumexp(dim=1) - positives_GN
    return (to_keys_GN.mean() + to_queries_GN.mean()) / 2


def standardise(values_TGND: Tensor) -> Tensor:
    """
    Mean 0 and variance 1 of each feature over the observations of a game, as in BatchNorm.

    What all observations of a game have in common, most of the picture, would otherwise make their
    cosines nearly 1 and their differences nearly 0, and learning would begin on a plateau.

    :param values_TGND: T views of N observations of G games; a mean is taken over T and N
    """
    assert values_TGND.ndim == 4, values_TGND.shape
    centred_TGND = values_TGND - values_TGND.mean(dim=(0, 2), keepdim=True)
    variance_1G1D = centred_TGND.square().mean(dim=(0, 2), keepdim=True)
    return centred_TGND * (variance_1G1D + 1e-5).rsqrt()


def inverse_dynamics_loss(logits_BA: Tensor, actions_B: Tensor) -> Tensor:
    """
    Cross entropy of the action between two observations (Pathak et al. 2017, arXiv 1705.05363).

    :param logits_BA: (B, A)
    :param actions_B: (B,) int64, the actions that were taken
    :return: scalar, in nats
    """
    assert logits_BA.shape[:1] == actions_B.shape, (logits_BA.shape, actions_B.shape)
    return F.cross_entropy(logits_BA, actions_B)


def masked_reconstruction_loss(
    predicted_BCHW: Tensor, target_BCHW: Tensor, mask_BCHW: Tensor, weight_BCHW: Tensor
) -> Tensor:
    """
    Weighted mean squared error of the hidden pixels (masked autoencoder, arXiv 2111.06377).

    :param predicted_BCHW: (B, C, H, W)
    :param target_BCHW: (B, C, H, W), the unmasked image
    :param mask_BCHW: bool, True where the network could not see
    :param weight_BCHW: at least 0; e.g. ``movement_weight``
    :return: scalar; 0 where nothing is hidden
    """
    assert predicted_BCHW.shape == target_BCHW.shape == mask_BCHW.shape == weight_BCHW.shape
    weight_BCHW = weight_BCHW * mask_BCHW
    error_BCHW = (predicted_BCHW - target_BCHW).square() * weight_BCHW
    return error_BCHW.sum() / weight_BCHW.sum().clamp(min=1e-8)


def return_prediction_loss(logits_BZ: Tensor, returns_B: Tensor, bins_Z: Tensor) -> Tensor:
    """
    Cross entropy with a two-hot target: the return shared out between its two nearest bins.

    As in Dreamer V3 (Hafner et al. 2023, arXiv 2301.04104); its mean over the bins is the return.

    :param logits_BZ: (B, Z)
    :param returns_B: (B,), normalised; beyond the outer bins they are clipped
    :param bins_Z: (Z,), ascending bin centres
    :return: scalar, in nats
    """
    assert logits_BZ.shape == (*returns_B.shape, *bins_Z.shape), (logits_BZ.shape, bins_Z.shape)
    return F.cross_entropy(logits_BZ, two_hot(returns_B, bins_Z))


def two_hot(values_B: Tensor, bins_Z: Tensor) -> Tensor:
    """Probabilities (B, Z) on the two bins around each value, whose mean is the clipped value."""
    values_B = values_B.clamp(float(bins_Z[0]), float(bins_Z[-1]))
    right_B = torch.searchsorted(bins_Z, values_B, right=True).clamp(1, len(bins_Z) - 1)
    left_edge_B, right_edge_B = bins_Z[right_B - 1], bins_Z[right_B]
    share_B1 = ((values_B - left_edge_B) / (right_edge_B - left_edge_B)).unsqueeze(1)
    target_BZ = values_B.new_zeros(len(values_B), len(bins_Z))
    target_BZ.scatter_(1, (right_B - 1).unsqueeze(1), 1 - share_B1)
    return target_BZ.scatter_(1, right_B.unsqueeze(1), share_B1)


def discounted_returns(rewards_BT: Tensor, alive_BT: Tensor, discount: float) -> Tensor:
    """
    Discounted sum of the next T rewards, (B,).

    :param rewards_BT: (B, T)
    :param alive_BT: bool, False from the step on that belongs to another episode
    :param discount: weight of a reward one step later
    """
    assert rewards_BT.shape == alive_BT.shape, (rewards_BT.shape, alive_BT.shape)
    powers_T = discount ** torch.arange(rewards_BT.shape[1], dtype=torch.float32)
    return (rewards_BT * alive_BT * powers_T).sum(dim=1)


def random_shift(images_BCHW: Tensor, shifts_B2: Tensor) -> Tensor:
    """
    Move each image by some pixels; the border repeats (DrQ, Kostrikov et al. 2020).

    :param images_BCHW: uint8, (B, C, H, W)
    :param shifts_B2: (B, 2) int64: how far down and how far right the picture moves
    """
    assert shifts_B2.shape == (len(images_BCHW), 2), shifts_B2.shape
    pad = max(int(shifts_B2.abs().max()), 1)
    height, width = images_BCHW.shape[-2:]
    padded_BCHW = _pad_with_border(images_BCHW, pad)
    shifted_BCHW = torch.empty_like(images_BCHW)
    # Copying whole rows image by image is four times as fast as one gather of single pixels.
    for b, (down, right) in enumerate((pad - shifts_B2).tolist()):
        shifted_BCHW[b] = padded_BCHW[b, :, down : down + height, right : right + width]
    return shifted_BCHW


def patch_mask(hidden_BCPQ: Tensor, size: tuple[int, int]) -> Tensor:
    """
    The pixels of hidden patches, bool (B, C, H, W).

    :param hidden_BCPQ: bool, which patches of each frame are hidden; P and Q divide H and W
    :param size: (H, W) in pixels
    """
    rows, columns = size[0] // hidden_BCPQ.shape[2], size[1] // hidden_BCPQ.shape[3]
    assert (rows * hidden_BCPQ.shape[2], columns * hidden_BCPQ.shape[3]) == size, size
    return hidden_BCPQ.repeat_interleave(rows, dim=2).repeat_interleave(columns, dim=3)


def mean_of_visible(images_BCHW: Tensor, mask_BCHW: Tensor) -> Tensor:
    """
    The images with each hidden pixel replaced by its mean over the frames that show it.

    :param images_BCHW: frames as channels
    :param mask_BCHW: bool, True where a pixel is hidden; 0 where all frames hide it
    """
    visible_BCHW = (~mask_BCHW).to(images_BCHW.dtype)
    n_visible_B1HW = visible_BCHW.sum(dim=1, keepdim=True).clamp(min=1)
    mean_B1HW = (images_BCHW * visible_BCHW).sum(dim=1, keepdim=True) / n_visible_B1HW
    return torch.where(mask_BCHW, mean_B1HW, images_BCHW)


def movement_weight(images_BCHW: Tensor, still: float) -> Tensor:
    """
    1 for pixels that change within the frame stack, ``still`` for all others; (B, C, H, W).

    Small moving objects are what matters in Atari, and a hundredth of the pixels.

    :param images_BCHW: the stack of frames, in [0, 1]
    :param still: weight of pixels that do not change
    """
    change_B1HW = images_BCHW.amax(dim=1, keepdim=True) - images_BCHW.amin(dim=1, keepdim=True)
    weight_B1HW = torch.where(change_B1HW > MOVED, 1.0, still)
    return weight_B1HW.expand_as(images_BCHW)


def _pad_with_border(images_BCHW: Tensor, pad: int) -> Tensor:
    """``F.pad(mode="replicate")``, which does not know uint8."""
    batch, channels, height, width = images_BCHW.shape
    padded = images_BCHW.new_empty(batch, channels, height + 2 * pad, width + 2 * pad)
    padded[:, :, pad:-pad, pad:-pad] = images_BCHW
    padded[:, :, :pad], padded[:, :, -pad:] = padded[:, :, pad, None], padded[:, :, -pad - 1, None]
    padded[..., :pad], padded[..., -pad:] = padded[..., pad, None], padded[..., -pad - 1, None]
    return padded
