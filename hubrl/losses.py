"""Losses of the pathway, pure and unweighted, and the one autograd trick: attaching a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Shape letters: B batch, E encoders, D features.


def pathway_exploration_loss(probabilities_BE: Tensor) -> Tensor:
    """
    Minus the entropy of the batch-mean pathway probabilities, in nats.

    It lies between -log(M), with M encoders to choose from, and 0.

    ``sum_i pbar_i log pbar_i`` with ``pbar`` the mean over the batch: least when the batch as a
    whole uses all encoders equally. Hub-Pathway (arXiv 2206.03726) has an exploration loss with
    coefficient 0.3; that it is the entropy of the batch mean is our reading: an entropy for each
    observation would fight specialisation.

    :param probabilities_BE: softmax over the encoders to choose from and 0 for the others, (B, E);
        each row sums to 1
    :return: scalar
    """
    assert probabilities_BE.ndim == 2, probabilities_BE.shape
    # A softmax that underflows to 0 would have an infinite gradient here.
    mean_E = probabilities_BE.mean(dim=0).clamp_min(torch.finfo(probabilities_BE.dtype).tiny)
    loss: Tensor = -torch.special.entr(mean_E).sum()
    return loss


def attach_loss(features_BD: Tensor, loss: Tensor) -> Tensor:
    """
    Add ``loss`` to whatever loss is later computed from ``features_BD``.

    Forward is the identity. Backward sends gradient 1 into ``loss``, so the parameters receive the
    gradient of (later loss + ``loss``), once for each backward pass through the result, inside
    SB3's gradient clipping and without a copy of its ``train()``. The result must be used: a
    discarded return value means no gradient. It is wrong where an algorithm differentiates
    something that is not its loss, as TRPO does with the KL divergence. The trick is that of the
    mixture-of-experts libraries (e.g. Megatron-LM's ``MoEAuxLossAutoScaler``).

    :param features_BD: any tensor that the later loss depends on
    :param loss: scalar, its coefficient included
    :return: ``features_BD``
    """
    assert loss.ndim == 0, loss.shape
    attached: Tensor = _AttachLoss.apply(features_BD, loss)
    return attached


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.dtype, loss.device)
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return grad_outputs[0], torch.ones((), dtype=dtype, device=device)
