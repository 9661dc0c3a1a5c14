"""``EncoderScaledAdam``: a smaller learning rate for pretrained encoders than for all else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Adam

from hubrl.encoders import is_encoder_weight


class EncoderScaledAdam(Adam):
    """
    Adam with a learning rate of its own for the weights of encoders, as ``optimizer_class``.

    Stable-Baselines3 sets one learning rate for all weights of a policy, also while it follows a
    schedule, and Adam's steps are the same for a gradient that was scaled. So the scale is applied
    at each step: encoders learn with ``encoder_lr_scale`` times the rate that SB3 sets.

    :param params: weights; those of encoders are found among them
    :param lr: learning rate of all other weights
    :param encoder_lr_scale: times ``lr`` is the encoders' learning rate; above 0 (to freeze
        encoders, use ``freeze`` of the extractor, which also saves their backward pass)
    :param kwargs: as of ``torch.optim.Adam``
    :raises ValueError: if ``encoder_lr_scale`` is not above 0
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        *,
        encoder_lr_scale: float,
        **kwargs: Any,
    ) -> None:
        if not 0 < encoder_lr_scale < math.inf:
            raise ValueError(
                f"encoder_lr_scale is {encoder_lr_scale}, allowed: a number above 0; "
                "to keep encoders as they are, give the extractor freeze='all'"
            )
        weights = list(params)
        encoders = [weight for weight in weights if is_encoder_weight(weight)]
        others = [weight for weight in weights if not is_encoder_weight(weight)]
        groups: list[dict[str, Any]] = [
            {"params": others, "lr_scale": 1.0},
            {"params": encoders, "lr_scale": encoder_lr_scale},
        ]
        super().__init__([group for group in groups if group["params"]], lr, **kwargs)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; the learning rates of ``param_groups`` are afterwards what they were."""
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = group["lr"] * group["lr_scale"]
        try:
            loss: float | None = super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate
        return loss
