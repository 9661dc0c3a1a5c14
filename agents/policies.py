"""SB3's CNN policies, but their features extractor gets images as uint8; and the baseline's one."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticCnnPolicy
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticCnnPolicy
from sb3_contrib.qrdqn import policies as qrdqn
from stable_baselines3.common.policies import ActorCriticCnnPolicy, BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.dqn import policies as dqn
from torch import Tensor

from hubrl.cuda_graphs import Recorded
from hubrl.precision import nature_layout


class RawImages(BasePolicy):
    """
    Mixin: images reach the features extractor as they are.

    SB3 makes a float32 copy of a batch, divided by 255, before the extractor sees it; that is four
    times the memory, and the extractor converts it again to what it computes in.
    """

    def extract_features(
        self, obs: Any, features_extractor: BaseFeaturesExtractor | None = None
    ) -> Any:
        extractor = self.features_extractor if features_extractor is None else features_extractor
        return extractor(obs)


# The mixin comes last: ActorCriticPolicy asks its superclass for features.
class ActorCriticImagePolicy(ActorCriticCnnPolicy, RawImages):
    """The policy of PPO and A2C; actor and critic share the features."""


class MaskableImagePolicy(MaskableActorCriticCnnPolicy, RawImages):
    """The policy of MaskablePPO."""


class RecurrentImagePolicy(RecurrentActorCriticCnnPolicy, RawImages):
    """The policy of RecurrentPPO."""


class _QNetwork(RawImages, dqn.QNetwork):
    pass


class DQNImagePolicy(dqn.CnnPolicy):
    """The policy of DQN."""

    def make_q_net(self) -> dqn.QNetwork:
        return _QNetwork(**self._update_features_extractor(self.net_args)).to(self.device)


class _QuantileNetwork(RawImages, qrdqn.QuantileNetwork):
    pass


class QRDQNImagePolicy(qrdqn.CnnPolicy):
    """The policy of QR-DQN."""

    def make_quantile_net(self) -> qrdqn.QuantileNetwork:
        return _QuantileNetwork(**self._update_features_extractor(self.net_args)).to(self.device)


class BaselineCNN(NatureCNN):
    """
    SB3's NatureCNN, the baseline without a hub, computing in bfloat16 where that is faster.

    :param observation_space: images, (C, H, W) uint8
    :param features_dim: length of the feature vector
    :param precision: ``float32`` or ``bfloat16``
    """

    def __init__(
        self, observation_space: gym.spaces.Box, features_dim: int = 512, precision: str = "float32"
    ) -> None:
        super().__init__(observation_space, features_dim)
        self._dtype = getattr(torch, precision)
        self._recorded = Recorded(self, BaselineCNN._features)

    def forward(self, observations: Tensor) -> Tensor:
        """
        :param observations: (B, C, H, W), uint8 or float in [0, 1]
        :return: (B, features_dim) float32
        """
        if observations.is_cuda:
            return self._recorded(self, observations)[0]
        return self._features(observations)[0]

    def _features(self, observations: Tensor) -> tuple[Tensor, ...]:
        images = observations.to(self._dtype)
        if observations.dtype == torch.uint8:
            images.div_(255.0)
        images = images.contiguous(memory_format=nature_layout(images, is_learning=True))
        is_fast = self._dtype != torch.float32
        with torch.autocast(images.device.type, self._dtype, enabled=is_fast):
            features: Tensor = self.linear(self.cnn(images)).float()
        return (features,)
