"""What self-supervised pretraining trains: convolutions and the heads of each objective."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hubrl.architectures import NatureConv
from hubrl.encoders import orthogonal_init
from hubrl.pretraining.objectives import (
    info_nce,
    inverse_dynamics_loss,
    masked_reconstruction_loss,
    mean_of_visible,
    movement_weight,
    patch_mask,
    return_prediction_loss,
    standardise,
)

# Shape letters: B batch (G games times N observations of each), D features, C H W image,
# L places of the last feature map.

IMAGE_SIZE = (84, 84)
FRAME_STACK = 4
N_CONV_FEATURES = 3136
N_FEATURES = 512
N_HIDDEN = 256


class Batch(NamedTuple):
    """Observations of some games, the same number N of each, one game after the other."""

    games: tuple[int, ...]
    """Index of each of the G games."""
    images: Tensor
    """(B, C, H, W) uint8."""
    later_images: Tensor | None
    """Observations some steps later in the same episodes, if the pretext looks ahead."""
    actions: Tensor
    """(B,) int64, what was done at ``images``."""
    returns: Tensor
    """(B,) float32, discounted sum of the rewards that followed."""


class PretextOutput(NamedTuple):
    """The loss of a batch, and what is worth a column of the log."""

    loss: Tensor
    log: dict[str, Tensor]


class Pretext(nn.Module):
    """
    An encoder, the convolutions of NatureCNN, and the heads that train it.

    NatureCNN's linear layer counts as a head: on another game a fresh one learns faster.

    :param n_actions: number of actions of each game
    :param dtype: format of the forward pass; weights stay float32
    """

    #: least and most steps from an observation to the later one; None: there is no later one
    steps_ahead: ClassVar[tuple[int, int] | None] = None
    #: whether an observation and the later one are shifted by the same pixels
    shifts_together: ClassVar[bool] = False

    def __init__(self, n_actions: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.encoder = NatureConv(FRAME_STACK)
        self._dtype = dtype
        self._build_heads(n_actions)
        orthogonal_init(self.encoder)
        self.register_buffer("first_loudness", torch.zeros(()))
        self.first_loudness: Tensor
        self.to(memory_format=torch.channels_last)

    @abstractmethod
    def forward(self, batch: Batch, rng: np.random.Generator) -> PretextOutput:
        """
        The loss of a batch.

        :param rng: draws what the objective leaves to chance
        """

    @torch.no_grad()
    def loudness(self, images_BCHW: Tensor) -> Tensor:
        """Root mean square of the features of these images, scalar."""
        with self._fast():
            features_BD = self.encoder(self._pixels(images_BCHW))
        loudness: Tensor = features_BD.float().square().mean().sqrt()
        return loudness

    @torch.no_grad()
    def scaled_encoder(self, factor: float) -> dict[str, Tensor]:
        """
        The encoder's tensors, its features multiplied by a positive factor.

        :param factor: for the last convolution; ReLU lets it through
        """
        tensors = {key: tensor.clone() for key, tensor in self.encoder.state_dict().items()}
        for key in list(tensors)[-2:]:
            tensors[key] *= factor
        return tensors

    def fit_returns(self, game: int, returns_B: Tensor) -> None:
        """Note the scale of a game's returns before training; most objectives need none."""

    @abstractmethod
    def _build_heads(self, n_actions: Sequence[int]) -> None: ...

    def _fast(self) -> contextlib.AbstractContextManager[None]:
        """For the networks; losses are computed outside, in float32."""
        if self._dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(next(self.parameters()).device.type, self._dtype)

    def _pixels(self, images_BCHW: Tensor) -> Tensor:
        """In [0, 1]. Exact in bfloat16 up to the division: it holds the integers up to 256."""
        return images_BCHW.to(self._dtype, memory_format=torch.channels_last) / 255.0

    def _feature_map(self, pixels_BCHW: Tensor) -> Tensor:
        """What the last convolution sees, (B, 64, 7, 7)."""
        map_BCHW: Tensor = self.encoder.cnn[:-1](pixels_BCHW)
        return map_BCHW


class ContrastPretext(Pretext):
    """
    Temporal contrast and, beside it, inverse dynamics.

    Which of the observations of the same game is the one some steps later? Asked for the whole
    image (CPC, CURL) and for each place of the feature map (ST-DIM, Anand et al. 2019, arXiv
    1906.08226), so that small objects count, too.
    """

    steps_ahead = (1, 4)

    def _build_heads(self, n_actions: Sequence[int]) -> None:
        self.summary = _summary()
        self.image_head = _mlp(N_FEATURES, 128)
        self.place_head = nn.Conv2d(64, 64, kernel_size=1)
        self.inverse = InverseHead(n_actions)

    def forward(self, batch: Batch, rng: np.random.Generator) -> PretextOutput:
        assert batch.later_images is not None
        shape = _views(batch)
        with self._fast():
            maps = self._feature_map(self._pixels(torch.cat([batch.images, batch.later_images])))
            features_TGND = _standard_features(self.summary(maps.flatten(1)), shape)
            images_TGND, places = self.image_head(features_TGND), self.place_head(maps)
            logits = self.inverse(features_TGND, batch.games)
        now_GND, later_GND = standardise(images_TGND.float())
        image = info_nce(now_GND, later_GND, temperature=0.1)
        places = places.float().flatten(2).view(*shape, 64, -1).permute(0, 1, 4, 2, 3)
        now_LND, later_LND = standardise(places.flatten(1, 2))
        place = info_nce(now_LND, later_LND, temperature=0.1)
        inverse, accuracy = _inverse_loss(logits, batch)
        log = {"image": image, "place": place, "inverse": inverse, "accuracy": accuracy}
        return PretextOutput(image + place + inverse, log)


class InversePretext(Pretext):
    """Inverse dynamics alone: which action lies between two observations?"""

    steps_ahead = (1, 1)
    shifts_together = True  # or the shift would hide the movement

    def _build_heads(self, n_actions: Sequence[int]) -> None:
        self.summary = _summary()
        self.inverse = InverseHead(n_actions)

    def forward(self, batch: Batch, rng: np.random.Generator) -> PretextOutput:
        assert batch.later_images is not None
        images = torch.cat([batch.images, batch.later_images])
        with self._fast():
            features = self.summary(self.encoder(self._pixels(images)))
            logits = self.inverse(_standard_features(features, _views(batch)), batch.games)
        loss, accuracy = _inverse_loss(logits, batch)
        return PretextOutput(loss, {"inverse": loss, "accuracy": accuracy})


class ReconstructionPretext(Pretext):
    """
    Hidden patches, others in each frame, are filled in from what is around them and other frames.

    The network sees a hidden pixel as its mean over the frames that show it, and says what is
    different: what stands still is given away, what moves is to be found. The decoder sees one
    place of the feature map at a time, so the convolutions themselves must say what is where. Half
    the resolution is enough of a target.
    """

    N_PATCHES = 7
    HIDDEN_SHARE = 0.5
    STILL_WEIGHT = 0.02

    def _build_heads(self, n_actions: Sequence[int]) -> None:
        side = IMAGE_SIZE[0] // 2 // self.N_PATCHES
        last = nn.Conv2d(N_HIDDEN, FRAME_STACK * side * side, kernel_size=1)
        # Random differences would teach the encoder to be silent first.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        first = nn.Conv2d(64, N_HIDDEN, kernel_size=1)
        self.decoder = nn.Sequential(first, nn.ReLU(), last, nn.PixelShuffle(side))

    def forward(self, batch: Batch, rng: np.random.Generator) -> PretextOutput:
        pixels_BCHW = self._pixels(batch.images)
        shape = (*pixels_BCHW.shape[:2], self.N_PATCHES, self.N_PATCHES)
        hidden_BCPQ = torch.from_numpy(rng.random(shape) < self.HIDDEN_SHARE).to(pixels_BCHW.device)
        mask_BCHW = patch_mask(hidden_BCPQ, IMAGE_SIZE)
        guess_BCHW = mean_of_visible(pixels_BCHW, mask_BCHW)
        with self._fast():
            difference_BCHW = self.decoder(self._feature_map(guess_BCHW)).float()
        guess_BCHW, target_BCHW = (
            F.avg_pool2d(images.float(), 2) for images in (guess_BCHW, pixels_BCHW)
        )
        rest = (
            target_BCHW,
            F.max_pool2d(mask_BCHW.float(), 2) > 0,
            movement_weight(target_BCHW, self.STILL_WEIGHT),
        )
        loss = masked_reconstruction_loss(guess_BCHW + difference_BCHW, *rest)
        guess_loss = masked_reconstruction_loss(guess_BCHW, *rest)
        return PretextOutput(loss, {"reconstruction": loss, "guess": guess_loss})


class ReturnsPretext(Pretext):
    """How much reward follows? The discounted return, normalised for each game, in bins."""

    def _build_heads(self, n_actions: Sequence[int]) -> None:
        self.register_buffer("bins", torch.linspace(-3.0, 5.0, 51))
        self.register_buffer("mean", torch.zeros(len(n_actions)))
        self.register_buffer("std", torch.ones(len(n_actions)))
        self.bins: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.head = nn.Sequential(_summary(), *_mlp(N_FEATURES, len(self.bins)))

    def fit_returns(self, game: int, returns_B: Tensor) -> None:
        """Normalise the game's returns by the mean and deviation of these."""
        self.mean[game] = returns_B.mean()
        self.std[game] = returns_B.std().clamp(min=1e-3)

    def forward(self, batch: Batch, rng: np.random.Generator) -> PretextOutput:
        with self._fast():
            logits = self.head(self.encoder(self._pixels(batch.images))).float()
        games = torch.tensor(batch.games, device=logits.device)
        games = games.repeat_interleave(len(logits) // len(games))
        returns = (batch.returns - self.mean[games]) / self.std[games]
        loss = return_prediction_loss(logits, returns, self.bins)
        error = (logits.detach().softmax(dim=1) @ self.bins - returns).square().mean()
        return PretextOutput(loss, {"returns": loss, "squared_error": error})


class InverseHead(nn.Module):
    """
    From the features of two observations to the action between them; a head for each game.

    :param n_actions: number of actions of each game
    """

    def __init__(self, n_actions: Sequence[int]) -> None:
        super().__init__()
        self.games = nn.ModuleList(_mlp(2 * N_FEATURES, n) for n in n_actions)

    def forward(self, features_TGND: Tensor, games: Sequence[int]) -> list[Tensor]:
        """
        Logits (N, A) of each game.

        :param features_TGND: of the observations, and of the later ones
        """
        pairs_GND = torch.cat([features_TGND[0], features_TGND[1] - features_TGND[0]], dim=2)
        parts = zip(games, pairs_GND, strict=True)
        return [self.games[game](pairs_ND) for game, pairs_ND in parts]


#: The self-supervised objectives by name.
PRETEXTS: dict[str, type[Pretext]] = {
    "contrast": ContrastPretext,
    "inverse": InversePretext,
    "reconstruction": ReconstructionPretext,
    "returns": ReturnsPretext,
}


def _views(batch: Batch) -> tuple[int, int, int]:
    """Now and later, games, observations of each game."""
    return 2, len(batch.games), len(batch.images) // len(batch.games)


def _standard_features(features_BD: Tensor, shape: tuple[int, int, int]) -> Tensor:
    return standardise(features_BD.float().view(*shape, -1))


def _inverse_loss(logits: list[Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss and accuracy, each the mean over the games."""
    losses, hits = [], []
    for logits_NA, actions_N in zip(logits, batch.actions.chunk(len(logits)), strict=True):
        losses.append(inverse_dynamics_loss(logits_NA.float(), actions_N))
        hits.append((logits_NA.argmax(dim=1) == actions_N).float().mean())
    return torch.stack(losses).mean(), torch.stack(hits).mean()


def _summary() -> nn.Sequential:
    """The linear layer of NatureCNN."""
    summary = nn.Sequential(nn.Linear(N_CONV_FEATURES, N_FEATURES), nn.ReLU())
    orthogonal_init(summary)
    return summary


def _mlp(n_inputs: int, n_outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_inputs, N_HIDDEN), nn.ReLU(), nn.Linear(N_HIDDEN, n_outputs))
