"""``HubCombinedExtractor``: a hub for the images among Dict observations, vectors beside them."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from hubrl.extractor import HubFeaturesExtractor

# Shape letters: B batch, D features.


class HubCombinedExtractor(BaseFeaturesExtractor):
    """
    Features of Dict observations, for ``MultiInputPolicy``: images through a hub, vectors beside.

    A key with three dimensions is an image and has a ``HubFeaturesExtractor`` of its own, with its
    own pathway generator and exploration loss; frozen encoders are held once for all keys. Other
    keys are flattened and concatenated behind the images' features, as in SB3's
    ``CombinedExtractor``. All else that ``HubFeaturesExtractor`` says holds here, too.

    :param observation_space: at least one key with images, channel first
    :param extractor: arguments of ``HubFeaturesExtractor``, for each image
    :raises ValueError: if there is no image, or what ``HubFeaturesExtractor`` raises
    """

    def __init__(self, observation_space: spaces.Dict, **extractor: Any) -> None:
        if not isinstance(observation_space, spaces.Dict):
            raise ValueError(
                f"observation space is {observation_space}, but HubCombinedExtractor takes a Dict: "
                "use HubFeaturesExtractor"
            )
        spaces_of_images = {
            key: space for key, space in observation_space.items() if _is_image(space)
        }
        if not spaces_of_images:
            raise ValueError(
                f"observation space has the keys {', '.join(observation_space)}, none of them with "
                "images (C, H, W): use SB3's CombinedExtractor"
            )
        vectors = {k: s for k, s in observation_space.items() if k not in spaces_of_images}
        extractors = {
            key: HubFeaturesExtractor(space, **extractor) for key, space in spaces_of_images.items()
        }
        features_dim = sum(extractor.features_dim for extractor in extractors.values())
        super().__init__(
            observation_space, features_dim + sum(map(get_flattened_obs_dim, vectors.values()))
        )
        self.images = nn.ModuleDict(extractors)
        self._vector_keys = list(vectors)

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """
        Features (B, D) float32: of the images in the order of their keys, then the vectors.

        :param observations: images (B, C, H, W), and vectors as SB3's preprocessing gives them
        """
        parts = [image(observations[key]) for key, image in self.images.items()]
        parts += [observations[key].flatten(1) for key in self._vector_keys]
        return torch.cat(parts, dim=1)


def _is_image(space: spaces.Space[Any]) -> TypeGuard[spaces.Box]:
    return isinstance(space, spaces.Box) and len(space.shape) == 3
