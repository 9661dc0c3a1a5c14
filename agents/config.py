"""The configuration of a run: typed sections, read from YAML and checked before all else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import pydantic
from pydantic import BeforeValidator, Field

from hubrl.extractor import UNFIT_ALGORITHMS
from hubrl.plain_yaml import dump_yaml
from hubrl.sections import (
    Count,
    Fraction,
    Integer,
    NonNegative,
    Positive,
    Schedule,
    Section,
    parse,
    read_mapping,
    with_overrides,
)
from hubrl.specs import closest

#: Complete configurations that ship with hubrl, one for each algorithm.
BUILT_IN_CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "agents"


Precision = Literal["auto", "float32", "bfloat16"]


#: Keys that came later, by section, and what runs did before.
LATER_KEYS: Mapping[str, Mapping[str, Any]] = {
    "env": {"timeout": 60.0},
    "hub": {
        "always_active": [],
        "freeze_layers": 0,
        "aggregation": "concat",
        "standardise": False,
        "generator": "small",
        "encoder_lr_scale": 1.0,
    },
    "train": {"n_checkpoints": 2, "n_rollbacks": 0},
}


class EnvSection(Section):
    """
    Where the agent learns.

    :param id: a Gymnasium id, such as ``ALE/Breakout-v5``
    :param n_envs: environments that are stepped side by side
    :param sticky: probability that an Atari emulator repeats the last action
    :param timeout: seconds that a step or a reset may take; none for Atari, whose emulators don't
        hang
    """

    id: str
    n_envs: Count
    sticky: Fraction
    timeout: Positive | None


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise ValueError("a name or a list of names")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class HubSection(Section):
    """
    What turns images into features.

    :param name: ``none`` (SB3's NatureCNN), a hub, ``HUB:ENCODER``, a folder or a YAML file
    :param top_k: encoders that run for an observation; ``auto``: 2, or 1 of a hub of one; nothing
        to choose for ``none``
    :param always_active: encoders that are among them for each observation; ``auto``: as the
        hub's card says, or the first
    :param generator: where pathway weights come from; ``uniform``: all encoders weigh the same
    :param exploration_coef: weight of the pathway exploration loss
    :param aggregation: how the encoders' features become one vector; ``auto``: ``sum`` where they
        have one length, else ``concat``
    :param standardise: bring each encoder's features to one scale before
    :param freeze: names of encoders that stay as they are, ``all``, or ``chosen``: all that aren't
        always active
    :param freeze_layers: first layers of each encoder that stay as they are
    :param random_init: orthogonal initialization in the place of the pretrained weights
    :param encoder_lr_scale: learning rate of the encoders, as a share of the algorithm's
    :param precision: what the encoders compute in
    """

    name: str
    top_k: Count | Literal["auto"]
    always_active: Names
    generator: Literal["small", "uniform"]
    exploration_coef: Schedule
    aggregation: Literal["auto", "concat", "sum"]
    standardise: bool
    freeze: Names
    freeze_layers: Annotated[Integer, Field(ge=0)]
    random_init: bool
    encoder_lr_scale: Positive
    precision: Precision


class PPOSection(Section):
    """Hyperparameters of SB3's ``PPO``."""

    name: Literal["ppo"]
    learning_rate: Schedule
    n_steps: Count
    batch_size: Annotated[Integer, Field(ge=2)]
    n_epochs: Count
    gamma: Fraction
    gae_lambda: Fraction
    clip_range: Schedule
    ent_coef: NonNegative
    vf_coef: NonNegative
    max_grad_norm: Positive
    normalize_advantage: bool


class A2CSection(Section):
    """Hyperparameters of SB3's ``A2C``."""

    name: Literal["a2c"]
    learning_rate: Schedule
    n_steps: Count
    gamma: Fraction
    gae_lambda: Fraction
    ent_coef: NonNegative
    vf_coef: NonNegative
    max_grad_norm: Positive
    normalize_advantage: bool


class DQNSection(Section):
    """Hyperparameters of SB3's ``DQN``."""

    name: Literal["dqn"]
    learning_rate: Schedule
    buffer_size: Count
    learning_starts: Annotated[Integer, Field(ge=0)]
    batch_size: Count
    tau: Fraction
    gamma: Fraction
    train_freq: Count
    gradient_steps: Annotated[Integer, Field(ge=-1)]
    target_update_interval: Count
    exploration_fraction: Fraction
    exploration_initial_eps: Fraction
    exploration_final_eps: Fraction
    max_grad_norm: Positive


class QRDQNSection(DQNSection):
    """Hyperparameters of SB3-Contrib's ``QRDQN``."""

    name: Literal["qrdqn"]  # type: ignore[assignment]
    max_grad_norm: Positive | None  # type: ignore[assignment]
    n_quantiles: Count


class MaskablePPOSection(PPOSection):
    """Hyperparameters of SB3-Contrib's ``MaskablePPO``."""

    name: Literal["maskable_ppo"]  # type: ignore[assignment]


class RecurrentPPOSection(PPOSection):
    """Hyperparameters of SB3-Contrib's ``RecurrentPPO``."""

    name: Literal["recurrent_ppo"]  # type: ignore[assignment]
    lstm_hidden_size: Count


class Layers(Section):
    """
    Widths of the hidden layers behind the features.

    :param pi: of the actor
    :param qf: of each critic
    """

    pi: tuple[Count, ...]
    qf: tuple[Count, ...]


class ContinuousSection(Section):
    """Hyperparameters of all off-policy algorithms for continuous actions."""

    learning_rate: Schedule
    buffer_size: Count
    learning_starts: Annotated[Integer, Field(ge=0)]
    batch_size: Annotated[Integer, Field(ge=2)]
    gamma: Fraction
    train_freq: Count
    gradient_steps: Annotated[Integer, Field(ge=-1)]
    net_arch: Layers


class SACSection(ContinuousSection):
    """Hyperparameters of SB3's ``SAC``."""

    name: Literal["sac"]
    tau: Fraction
    ent_coef: Annotated[float, Field(ge=0)] | Literal["auto"]
    target_update_interval: Count


class TD3Section(ContinuousSection):
    """Hyperparameters of SB3's ``TD3``; ``action_noise_std`` is that of the actions it collects."""

    name: Literal["td3"]
    tau: Fraction
    action_noise_std: NonNegative
    policy_delay: Count
    target_policy_noise: NonNegative
    target_noise_clip: NonNegative


class DDPGSection(ContinuousSection):
    """Hyperparameters of SB3's ``DDPG``; ``action_noise_std`` as in ``TD3Section``."""

    name: Literal["ddpg"]
    tau: Fraction
    action_noise_std: NonNegative


class TQCSection(SACSection):
    """Hyperparameters of SB3-Contrib's ``TQC``."""

    name: Literal["tqc"]  # type: ignore[assignment]
    n_quantiles: Count
    n_critics: Count
    top_quantiles_to_drop_per_net: Annotated[Integer, Field(ge=0)]

    @pydantic.model_validator(mode="after")
    def _check_quantiles(self) -> Self:
        dropped = self.top_quantiles_to_drop_per_net
        if dropped >= self.n_quantiles:
            raise ValueError(
                f"top_quantiles_to_drop_per_net is {dropped}, allowed: less than n_quantiles, "
                f"{self.n_quantiles}"
            )
        return self


class CrossQSection(ContinuousSection):
    """Hyperparameters of SB3-Contrib's ``CrossQ``."""

    name: Literal["crossq"]
    ent_coef: Annotated[float, Field(ge=0)] | Literal["auto"]
    policy_delay: Count


AnySection = (
    PPOSection
    | A2CSection
    | DQNSection
    | QRDQNSection
    | SACSection
    | TD3Section
    | DDPGSection
    | TQCSection
    | CrossQSection
    | MaskablePPOSection
    | RecurrentPPOSection
)
AlgorithmSection = Annotated[AnySection, Field(discriminator="name")]


class TrainSection(Section):
    """
    How long to train, what to save and when to evaluate.

    :param n_timesteps: agent steps, summed over all environments
    :param seed: everything random follows from it
    :param eval_freq: agent steps between two evaluations; 0: none
    :param n_eval_episodes: whole games of an evaluation
    :param deterministic_eval: take the best action, or sample as in training (rl-zoo's choice for
        Atari, where a deterministic agent can be stuck for a whole game)
    :param save_freq: agent steps between two checkpoints; 0: only at the end
    :param n_checkpoints: the last ones that are kept, beside the best
    :param n_rollbacks: how often a run whose loss is no number any more goes back to its last
        checkpoint with half the learning rate, before it stops
    :param device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
    """

    n_timesteps: Count
    seed: Annotated[Integer, Field(ge=0, lt=2**32)]
    eval_freq: Annotated[Integer, Field(ge=0)]
    n_eval_episodes: Count
    deterministic_eval: bool
    save_freq: Annotated[Integer, Field(ge=0)]
    n_checkpoints: Annotated[Integer, Field(ge=2)]
    n_rollbacks: Annotated[Integer, Field(ge=0, le=1000)]
    device: str


class RunConfig(Section):
    """All settings of a run, by owner."""

    env: EnvSection
    hub: HubSection
    algorithm: AlgorithmSection
    train: TrainSection

    @pydantic.model_validator(mode="after")
    def _check_rollout(self) -> Self:
        if isinstance(self.algorithm, PPOSection) and self.algorithm.n_steps * self.env.n_envs < 2:
            raise ValueError(
                "algorithm.n_steps * env.n_envs is 1, but PPO needs a rollout of at least 2 steps"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_advantages(self) -> Self:
        """One advantage has no deviation; SB3's own PPO alone leaves it as it is then."""
        algorithm = self.algorithm
        if type(algorithm) not in (A2CSection, MaskablePPOSection, RecurrentPPOSection):
            return self
        assert isinstance(algorithm, (A2CSection, PPOSection))
        n = algorithm.n_steps * self.env.n_envs
        size = algorithm.batch_size if isinstance(algorithm, PPOSection) else n
        if algorithm.normalize_advantage and (n == 1 or n % size == 1):
            raise ValueError(
                f"algorithm.n_steps * env.n_envs is {n}, of which {algorithm.name} would normalise "
                "one advantage by itself: change algorithm.n_steps"
                + (" or algorithm.batch_size" if n > 1 else " or algorithm.normalize_advantage")
            )
        return self

    def why_nothing_is_learned(self) -> str | None:
        """What is wrong with a run that ends before its first update; None if it doesn't."""
        algorithm, n = self.algorithm, self.train.n_timesteps
        if isinstance(algorithm, (PPOSection, A2CSection)):
            n_rollout = algorithm.n_steps * self.env.n_envs
            if n > n_rollout or algorithm.learning_rate.end > 0:
                return None
            what = f"one rollout ({n_rollout:,}), after which the learning rate is 0"
        else:
            n_each = algorithm.train_freq * self.env.n_envs
            if -(-n // n_each) * n_each > algorithm.learning_starts:
                return None
            what = f"algorithm.learning_starts ({algorithm.learning_starts:,})"
        return f"nothing is learned in {n:,} steps: they are no more than {what}; raise -n"


def algorithm_names() -> list[str]:
    """The names that ``algorithm.name`` may have."""
    return list(_algorithm_sections())


def built_in_config(algorithm: str) -> Path:
    """
    The configuration that ships for an algorithm.

    :raises ValueError: if there is no such algorithm
    """
    _check_algorithm(algorithm)
    (file,) = BUILT_IN_CONFIGS.glob(f"{algorithm}-*.yaml")
    return file


def load_config(file: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """
    Read a complete configuration.

    :param file: YAML
    :param overrides: values by key path, such as ``{"train.seed": 3}``; they win over the file
    :raises ValueError: if the file can't be read, or a key or a value is wrong; one line
    """
    return parse_config(with_overrides(read_mapping(file), overrides or {}))


def parse_config(data: Mapping[str, Any]) -> RunConfig:
    """
    Check plain data.

    :raises ValueError: one line for the first wrong key or value: its key path, the value, what is
        allowed, and the closest key
    """
    algorithm = data.get("algorithm")
    if isinstance(algorithm, dict) and "name" in algorithm:
        _check_algorithm(algorithm["name"])
    return parse(RunConfig, data)


def dump_config(config: RunConfig) -> str:
    """YAML that ``load_config`` reads back to an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def _algorithm_sections() -> dict[str, type[Section]]:
    sections: tuple[type[Section], ...] = get_args(AnySection)
    return {get_args(section.model_fields["name"].annotation)[0]: section for section in sections}


def _check_algorithm(name: Any) -> None:
    if isinstance(name, str) and name in UNFIT_ALGORITHMS:
        raise ValueError(f"algorithm.name {name!r} can't train a hub: {UNFIT_ALGORITHMS[name]}")
    allowed = algorithm_names()
    if name not in allowed:
        raise ValueError(
            f"algorithm.name is {name!r}{closest(str(name), allowed)}, "
            f"allowed: {', '.join(allowed)}"
        )
