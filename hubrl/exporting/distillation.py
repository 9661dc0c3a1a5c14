"""Distillation: one encoder's agent learns to answer as a hub's agent does."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.distributions import kl_divergence, make_proba_distribution
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor
from torch.nn import functional as F

from hubrl.exporting.outputs import Outputs, has_action_values, outputs
from hubrl.exporting.play import Games, Images, agents_play

# Shape letters: B batch, C H W image.

CHUNK_STEPS = 16  # of each game, between updates
UPDATES = 8  # after each chunk: each observation is learned from about 8 times
BATCH = 128
CAPACITY = 20_000  # observations that are kept to learn from: 0.6 GB at 84x84 pixels
LEARNING_RATE = 5e-4
TEACHERS_SHARE = 1 / 3  # of the play; the student's own follows (DAgger, Ross et al. 2011)
TEMPERATURE = 0.1
MIN_SCALE = 1e-6  # of a loss: what is smaller needs no learning


class Distillation:
    """
    Play of the teacher, then of the student; the teacher answers all of it, the student learns.

    Both see the same games, in the first and the last of their views. Adam, its rate falling to 0
    by a cosine.

    :param teacher: a trained agent
    :param student: an agent of the same algorithm and action space
    :param games: one view for both, or one for each
    :param n_steps: agent steps of play, over all games; rounded down to whole chunks
    """

    def __init__(
        self, teacher: BaseAlgorithm, student: BaseAlgorithm, games: Games, n_steps: int
    ) -> None:
        self.n_chunks = max(1, n_steps // (CHUNK_STEPS * games.n_envs))
        self.n_frames = 0
        self._teacher, self._student, self._games = teacher, student, games
        self._memory = Memory(min(CAPACITY, self.n_chunks * CHUNK_STEPS * games.n_envs))
        self._rng = np.random.default_rng(teacher.seed)
        self._optimizer = torch.optim.Adam(student.policy.parameters(), LEARNING_RATE)
        _copy_randomness(teacher, student)

    def run(self) -> Iterator[dict[str, float]]:
        """
        Learn; for each chunk of play a row of the log, of means over its updates.

        :raises ValueError: if teacher and student don't see the same game
        """
        for chunk in range(self.n_chunks):
            self._play(is_teacher=chunk < self.n_chunks * TEACHERS_SHARE)
            rate = LEARNING_RATE * (1 + math.cos(math.pi * chunk / self.n_chunks)) / 2
            self._optimizer.param_groups[0]["lr"] = rate
            logs = [self._update() for _ in range(UPDATES)]
            means = {name: float(np.mean([log[name] for log in logs])) for name in logs[0]}
            yield {"update": (chunk + 1) * UPDATES, "frames": self.n_frames, **means}
        _copy_targets(self._student.policy)

    def test(self, n_steps: int) -> dict[str, float]:
        """
        The same numbers on fresh play of the student, from which nothing is learned.

        :param n_steps: of each game
        """
        views = self._games.play(n_steps, agents_play(self._student, -1))
        labels, answer = answers(self._teacher, views[0]), answers(self._student, views[-1])
        policy = self._student.policy
        measured = {**losses(policy, answer, labels), **accuracy(policy, answer, labels)}
        return {name: float(value) for name, value in measured.items()}

    def _play(self, is_teacher: bool) -> None:
        act = agents_play(self._teacher, 0) if is_teacher else agents_play(self._student, -1)
        views = self._games.play(CHUNK_STEPS, act)
        self._memory.add(views[-1], answers(self._teacher, views[0]))
        self.n_frames += len(views[0])

    def _update(self) -> dict[str, float]:
        policy = self._student.policy
        images_BCHW, labels = self._memory.sample(self._rng, BATCH, policy.device)
        policy.set_training_mode(True)
        answer = outputs(policy, images_BCHW)
        log, scales = losses(policy, answer, labels), loss_scales(policy, labels)
        loss = torch.stack([log[name] / scales[name] for name in log]).sum()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        log |= accuracy(policy, answer, labels)
        return {name: float(value.detach()) for name, value in log.items()}


class Memory:
    """
    The last observations of a student with the teacher's answers to them.

    :param capacity: number of observations
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._tensors: tuple[Tensor | None, ...] = ()
        self._n_added = 0

    def add(self, images: Images, labels: Outputs) -> None:
        """Keep observations (B, C, H, W), and what the teacher says of them."""
        new = (torch.from_numpy(images), *labels)
        if not self._tensors:
            self._tensors = tuple(
                None if part is None else torch.empty(self._capacity, *part.shape[1:]).to(part)
                for part in new
            )
        places = (torch.arange(len(images)) + self._n_added) % self._capacity
        for kept, part in zip(self._tensors, new, strict=True):
            if kept is not None and part is not None:
                kept[places.to(kept.device)] = part
        self._n_added += len(images)

    def sample(
        self, rng: np.random.Generator, n: int, device: torch.device
    ) -> tuple[Tensor, Outputs]:
        """Observations drawn with replacement, and their labels."""
        rows = torch.from_numpy(rng.integers(min(self._n_added, self._capacity), size=n))
        images, *labels = (
            None if kept is None else kept[rows.to(kept.device)].to(device)
            for kept in self._tensors
        )
        assert images is not None
        return images, Outputs(*labels)  # type: ignore[arg-type]


def answers(agent: BaseAlgorithm, images: Images) -> Outputs:
    """The agent's outputs for observations, without grad; in batches."""
    agent.policy.set_training_mode(False)
    with torch.no_grad():
        parts = [
            outputs(agent.policy, torch.from_numpy(images[i : i + BATCH]).to(agent.device))
            for i in range(0, len(images), BATCH)
        ]
    columns = zip(*parts, strict=True)
    return Outputs(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def losses(policy: BasePolicy, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    """
    How far the student's answers are from the teacher's; scalars, by name.

    ``kl``: of the distributions of actions, KL(teacher || student), nats; of Q-values those that a
    softmax makes of them (policy distillation, Rusu et al. 2016, arXiv 1511.06295), sharp enough
    for the best action to count most. ``mean_action``: the mean squared error of continuous
    actions' means. ``values``: the mean squared error of the rest.

    :param policy: of either
    """
    found = {}
    if isinstance(policy.action_space, spaces.Box):
        found["mean_action"] = F.mse_loss(student.scores, teacher.scores)
    else:
        unit = _temperature(teacher.scores) if has_action_values(policy) else 1.0
        found["kl"] = _kl(policy.action_space, teacher.scores / unit, student.scores / unit)
    if student.values is not None and teacher.values is not None:
        found["values"] = F.mse_loss(student.values, teacher.values)
    return found


def loss_scales(policy: BasePolicy, teacher: Outputs) -> dict[str, Tensor]:
    """
    What the losses are divided by before they are added: the losses of the teacher's mean answer.

    So all count alike, whatever a game's rewards are, and however sure the teacher is. Where its
    answers hardly differ from each other, a hundredth of the losses of all zeros is taken.
    """
    mean = _answered(teacher, lambda part: part.mean(dim=0).expand_as(part))
    zero = _answered(teacher, torch.zeros_like)
    of_mean, of_zero = losses(policy, mean, teacher), losses(policy, zero, teacher)
    return {
        name: torch.maximum(of_mean[name], 0.01 * of_zero[name]).clamp_min(MIN_SCALE)
        for name in of_mean
    }


def accuracy(policy: BasePolicy, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    """The share of observations with equal deterministic actions; nothing for continuous ones."""
    if isinstance(policy.action_space, spaces.Box):
        return {}
    equal = student.actions == teacher.actions
    return {"accuracy": equal.reshape(len(equal), -1).all(dim=1).float().mean()}


def acting_seconds(agents: Sequence[BaseAlgorithm], images: Sequence[Images]) -> list[float]:
    """
    For each agent the fastest of 50 calls of ``predict``; in turns, on a machine that may be busy.

    :param images: for each agent a batch that it sees
    """
    seconds = [float("inf")] * len(agents)
    for _ in range(50):
        for i, (agent, observations) in enumerate(zip(agents, images, strict=True)):
            start = time.perf_counter()
            agent.predict(observations, deterministic=True)
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    return seconds


def _answered(teacher: Outputs, by: Callable[[Tensor], Tensor]) -> Outputs:
    values = None if teacher.values is None else by(teacher.values)
    return Outputs(teacher.actions, by(teacher.scores), values)


def _temperature(q_values_BA: Tensor) -> Tensor:
    """Of the softmax, in units of how much the Q-values of an observation differ."""
    advantages_BA = q_values_BA - q_values_BA.mean(dim=1, keepdim=True)
    return TEMPERATURE * advantages_BA.std().clamp_min(MIN_SCALE)


def _kl(space: spaces.Space[Any], teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over the batch of the divergence, summed over the parts of an action."""
    true, found = (
        make_proba_distribution(space).proba_distribution(logits) for logits in (teacher, student)
    )
    divergence = kl_divergence(true, found)
    return divergence.reshape(len(teacher), -1).sum(dim=1).mean()


def _copy_randomness(teacher: BaseAlgorithm, student: BaseAlgorithm) -> None:
    """How much the agents explore does not follow from an observation."""
    if isinstance(log_std := getattr(teacher.policy, "log_std", None), Tensor):
        student.policy.log_std.data.copy_(log_std)  # type: ignore[operator]
    if hasattr(teacher, "exploration_rate"):
        student.exploration_rate = teacher.exploration_rate  # type: ignore[attr-defined]


def _copy_targets(policy: BasePolicy) -> None:
    """Target networks are those that the student has learned."""
    for name in ("q_net", "quantile_net", "actor"):
        target = getattr(policy, f"{name}_target", None)
        if target is not None:
            target.load_state_dict(getattr(policy, name).state_dict())
