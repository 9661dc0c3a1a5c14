"""``HubCombinedExtractor``: a hub of pretrained encoders for the images of Dict observations."""

from __future__ import annotations

from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import TensorDict
from torch import Tensor, nn

from hubrl.extractor import HubFeaturesExtractor


class HubCombinedExtractor(BaseFeaturesExtractor):
    """
    Images of a Dict through a hub, vectors as they are, one after another: for SB3's
    ``MultiInputPolicy``, in the place of its ``CombinedExtractor``.

    A key whose space is a Box of three dimensions is an image, uint8 or float in 0..1; the others
    are flattened as SB3 prepares them, discrete ones as one-hot vectors. Each image key has a
    ``HubFeaturesExtractor`` of its own, with its pathway generator, its trained encoders and its
    exploration loss; frozen encoders are held once per process for all of them. What that class
    promises holds here, for each key.

    Give ``net_arch=[]`` only where images matter alone: without further layers the vectors act
    linearly.

    :param observation_space: a Dict with at least one image, channel first
    :param hub_arguments: ``hub``, ``top_k`` and all others of ``HubFeaturesExtractor``, alike for
        each image key; ``features_dim`` is the length of the features of one image key
    :raises ValueError: if the space is no Dict, has no image, an argument is out of its range, or
        the hub cannot take an image
    """

    def __init__(self, observation_space: spaces.Dict, **hub_arguments: Any) -> None:
        images = _image_spaces(observation_space)
        extractors = {key: _extractor(key, images[key], hub_arguments) for key in images}
        features_dim = sum(
            extractors[key].features_dim if key in images else get_flattened_obs_dim(space)
            for key, space in observation_space.spaces.items()
        )
        super().__init__(observation_space, features_dim)
        self._keys = tuple(observation_space.spaces)
        self._image_keys = tuple(images)
        # A list: names of modules must not have a dot, as keys may.
        self._extractors = nn.ModuleList(extractors.values())

    @property
    def image_extractors(self) -> dict[str, HubFeaturesExtractor]:
        """The extractor of each image key."""
        return dict(zip(self._image_keys, self._extractors, strict=True))  # type: ignore[arg-type]

    def forward(self, observations: TensorDict) -> Tensor:
        """Features (B, features_dim) float32, keys in the order of the space."""
        extractors = self.image_extractors
        parts = []
        for key in self._keys:
            part, extractor = observations[key], extractors.get(key)
            parts.append(part.flatten(1) if extractor is None else extractor(part))
        return torch.cat(parts, dim=1)


def _image_spaces(observation_space: spaces.Space[Any]) -> dict[str, spaces.Box]:
    if not isinstance(observation_space, spaces.Dict):
        raise ValueError(
            f"observation space is a {type(observation_space).__name__}, but HubCombinedExtractor "
            "takes a Dict: use hubrl.HubFeaturesExtractor for images alone"
        )
    images = {
        key: space
        for key, space in observation_space.spaces.items()
        # SB3's judgement without dtype and bounds: a float image must not pass for a vector.
        if isinstance(space, spaces.Box) and is_image_space(space, normalized_image=True)
    }
    if not images:
        raise ValueError(
            f"observation space has no image (a Box of three dimensions) among its keys "
            f"{', '.join(observation_space.spaces)}: use SB3's CombinedExtractor"
        )
    return images


def _extractor(key: str, space: spaces.Box, arguments: dict[str, Any]) -> HubFeaturesExtractor:
    try:
        return HubFeaturesExtractor(space, **arguments)
    except ValueError as error:
        raise ValueError(f"observation key {key!r} (an image, of 3 dimensions): {error}") from None
