"""Self-supervised training: plays games, trains a pretext on the frames, logs, saves its state."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from hubrl.files import save_tensors, with_prefix
from hubrl.precision import resolve_precision
from hubrl.pretraining.frames import Player
from hubrl.pretraining.objectives import discounted_returns, random_shift
from hubrl.pretraining.pretext import FRAME_STACK, IMAGE_SIZE, PRETEXTS, Batch

FIRST_STEPS = 256  # steps of play of each game before the first update
FRAMES_PER_UPDATE = 32  # over all games
BATCH = 256  # observations, and as many later ones where the objective looks ahead
GAMES_PER_BATCH = 4
MAX_SHIFT = 8  # pixels, a place of the feature map; 4 and 1 generalised less to another game
HORIZON = 32  # rewards that count as what follows
DISCOUNT = 0.97
LEARNING_RATE = 1e-3
WARM_UP = 100  # updates


class Budget(NamedTuple):
    """When training ends: whichever comes first, if both are given."""

    n_frames: int | None = None
    """Agent steps to play, over all games."""
    minutes: float | None = None
    """Of training, pauses not included."""


class Progress(NamedTuple):
    """How far a run is."""

    update: int
    seconds: float
    """Of training, pauses not included."""


class Trainer:
    """
    Trains a pretext; everything random follows from the seed and the number of the update.

    :param objective: a key of ``PRETEXTS``
    :param players: one for each game, with the same number of environments
    :param budget: the learning rate falls towards its end
    :param seed: of the weights and of the samples; play has its own
    :param device: where the network is trained
    """

    def __init__(
        self,
        objective: str,
        players: Sequence[Player],
        budget: Budget,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.players = players
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            n_actions = [player.n_actions for player in players]
            dtype = resolve_precision("auto", device)
            self.pretext = PRETEXTS[objective](n_actions, dtype).to(device)
        self._parameters = dict(self.pretext.named_parameters())
        self._optimizer = torch.optim.Adam(self._parameters.values(), lr=LEARNING_RATE)
        self._budget = budget
        self._seed = seed
        self._device = device
        self.progress = Progress(0, 0.0)

    @property
    def share_done(self) -> float:
        """0 before the first update; 1 or more: done."""
        frames, minutes = self._budget
        by_frames = self.n_frames / frames if frames else 0.0
        return max(by_frames, self.progress.seconds / 60 / minutes if minutes else 0.0)

    @property
    def n_frames(self) -> int:
        """Agent steps played, over all games."""
        first = len(self.players) * FIRST_STEPS * self._n_envs
        return first + self.progress.update * FRAMES_PER_UPDATE

    def update(self) -> dict[str, float]:
        """Play on, learn from one batch; returns what is worth a column of the log."""
        start = time.perf_counter()
        update, share = self.progress.update, self.share_done
        self.play()
        rng = np.random.default_rng((self._seed, update))
        batch = self._sample(rng)
        if update == 0:
            self._fit_returns()
            self.pretext.first_loudness.copy_(self.pretext.loudness(batch.images))
        rate = LEARNING_RATE * min(1.0, (update + 1) / WARM_UP) * max(0.0, 1.0 - share) ** 0.5
        self._optimizer.param_groups[0]["lr"] = rate
        output = self.pretext(batch, rng)
        self._optimizer.zero_grad()
        output.loss.backward()
        self._optimizer.step()
        log = {name: float(value.detach()) for name, value in output.log.items()}
        seconds = self.progress.seconds + time.perf_counter() - start
        self.progress = Progress(update + 1, seconds)
        return log

    def encoder(self) -> dict[str, Tensor]:
        """
        The encoder's tensors, with features as loud as those of random weights on these games.

        Objectives leave features at scales up to 50 times apart. Calibrated, members of a hub count
        the same at first, and a difference to random weights is one of what the features say.
        """
        self.play()
        batch = self._sample(np.random.default_rng((self._seed, self.progress.update)))
        factor = self.pretext.first_loudness / self.pretext.loudness(batch.images)
        return self.pretext.scaled_encoder(float(factor))

    def play(self) -> None:
        """Play all frames that the next update may read."""
        steps = self.progress.update * FRAMES_PER_UPDATE // (self._n_envs * len(self.players))
        for player in self.players:
            player.play_until(FIRST_STEPS + steps)

    def save(self, file: Path) -> None:
        """Write the state to a safetensors file, in one go."""
        tensors = {f"model.{key}": value for key, value in self.pretext.state_dict().items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        save_tensors(tensors, file, {"progress": json.dumps(self.progress)})

    def load(self, file: Path) -> None:
        """
        Go on from a saved state.

        :raises ValueError: if the file is damaged
        """
        try:
            with safe_open(file, "pt") as state:
                progress = json.loads(state.metadata()["progress"])
                tensors = {key: state.get_tensor(key) for key in state.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(
                f"out: {file} is damaged ({error}); remove its folder to begin anew"
            ) from None
        self.progress = Progress(*progress)
        self.pretext.load_state_dict(with_prefix(tensors, "model."))
        moments = [with_prefix(tensors, f"optimizer.{name}.") for name in self._parameters]
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": dict(enumerate(moments)), "param_groups": groups})

    @property
    def _n_envs(self) -> int:
        return self.players[0].frames.n_envs

    def _fit_returns(self) -> None:
        for game, player in enumerate(self.players):
            rng = np.random.default_rng((self._seed, 0, game))
            places = player.frames.sample(rng, 1024, HORIZON)
            rewards, alive = player.frames.next_rewards(places, HORIZON)
            self.pretext.fit_returns(game, _returns(rewards, alive))

    def _sample(self, rng: np.random.Generator) -> Batch:
        games = rng.permutation(len(self.players))[:GAMES_PER_BATCH].tolist()
        parts = [self._sample_game(game, BATCH // len(games), rng) for game in games]
        images, later, actions, rewards, alive = (
            np.concatenate(part) for part in zip(*parts, strict=True)
        )
        shifts = rng.integers(-MAX_SHIFT, MAX_SHIFT + 1, (2, len(images), 2))
        if self.pretext.shifts_together:
            shifts[1] = shifts[0]
        return Batch(
            tuple(games),
            self._shifted(images, shifts[0]),
            self._shifted(later, shifts[1]) if len(later) else None,
            torch.from_numpy(actions).to(self._device),
            _returns(rewards, alive).to(self._device),
        )

    def _sample_game(self, game: int, n: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        frames, ahead = self.players[game].frames, self.pretext.steps_ahead
        if ahead is None:
            places = frames.sample(rng, n, HORIZON)
            later = np.empty((0, FRAME_STACK, *IMAGE_SIZE), dtype=np.uint8)
        else:
            offsets = rng.integers(ahead[0], ahead[1] + 1, n)
            places = frames.sample_pairs(rng, offsets)
            later = frames.observations(places.later(offsets))
        rewards = frames.next_rewards(places, HORIZON if ahead is None else 1)
        return frames.observations(places), later, frames.actions(places), *rewards

    def _shifted(self, images: np.ndarray, shifts: np.ndarray) -> Tensor:
        return random_shift(torch.from_numpy(images), torch.from_numpy(shifts)).to(self._device)


def _returns(rewards: np.ndarray, alive: np.ndarray) -> Tensor:
    return discounted_returns(torch.from_numpy(rewards), torch.from_numpy(alive), DISCOUNT)
