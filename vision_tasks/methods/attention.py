"""``attention``: all encoders run, frozen; learned attention weighs their heads' outputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hubrl.aggregation import Contribution
from hubrl.encoder_list import EncoderList
from hubrl.precision import resolve_precision
from hubrl.specs import HubSpec
from vision_tasks.methods.method import (
    Method,
    Settings,
    build_aggregator,
    build_head,
    seeded,
)
from vision_tasks.tasks import Task

# Shape letters: B batch, E encoders, O outputs, D features of one encoder, A attention's width,
# C H W image.


class Attention(Method):
    """
    Soft, input-dependent weights over frozen models, as of A2T (Rajendran et al., ICLR 2017, arXiv
    1510.02879), in the form of scaled dot products (Vaswani et al. 2017, arXiv 1706.03762).

    Each encoder's standardised features give a key and a share of the query; the weights are a
    softmax over the encoders of query times key, equal at the start. The heads' outputs are
    weighted and aggregated as in ``hub-pathway``. Simplified: A2T also has a network that learns
    from scratch among the models.
    """

    WIDTH = 64

    def __init__(self, hub: HubSpec, task: Task, settings: Settings) -> None:
        super().__init__(hub, task, settings)
        with seeded(settings.seed, "attention"):
            self.encoders = EncoderList(hub, hub.encoder_names, settings.pretrained)
            self.queries, self.keys = (
                nn.ModuleList(nn.Linear(spec.features_dim, self.WIDTH) for spec in hub.encoders)
                for _ in range(2)
            )
        for key in self.keys.parameters():
            nn.init.zeros_(key)
        self.heads = nn.ModuleList(build_head(spec, task, settings.seed) for spec in hub.encoders)
        self.aggregator = build_aggregator(hub, task)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Outputs (B, O)."""
        features = self._features(images_BCHW)
        rows_B = torch.arange(len(images_BCHW), device=images_BCHW.device)
        contributions = [
            Contribution(i, rows_B, head(features_BD))
            for i, (head, features_BD) in enumerate(zip(self.heads, features, strict=True))
        ]
        outputs_BO: Tensor = self.aggregator(contributions, self.weights(features))
        return outputs_BO

    def weights(self, features: list[Tensor]) -> Tensor:
        """
        Attention over the encoders, (B, E); rows sum to 1.

        :param features: (B, D) of each encoder
        """
        standard = [F.layer_norm(features_BD, features_BD.shape[1:]) for features_BD in features]
        queries, keys = (
            torch.stack([layer(each) for layer, each in zip(layers, standard, strict=True)], dim=1)
            for layers in (self.queries, self.keys)
        )
        query_BA, keys_BEA = queries.mean(dim=1), keys
        scores_BE = torch.einsum("ba,bea->be", query_BA, keys_BEA) / math.sqrt(self.WIDTH)
        return scores_BE.softmax(dim=1)

    @torch.no_grad()
    def _features(self, images_BCHW: Tensor) -> list[Tensor]:
        dtype = resolve_precision(self.settings.precision, images_BCHW.device)
        return [encoder(images_BCHW, dtype).float() for encoder in self.encoders]
