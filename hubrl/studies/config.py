"""The configuration of a study: variants, games and seeds, read from YAML and checked first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import pydantic
from pydantic import Field

from agents.config import RunConfig, load_config
from hubrl.sections import Count, Integer, Section, check_override, parse, read_mapping
from hubrl.specs import closest, list_hubs

#: What a study sets itself: key of a run -> key of the study.
OWN_KEYS = {"env.id": "games", "train.seed": "seeds", "train.n_timesteps": "n_timesteps"}

Seeds = Annotated[
    tuple[Annotated[Integer, Field(ge=0, lt=2**32)], ...],
    Field(min_length=1),
]
Share = Annotated[float, Field(gt=0, le=1)]


class Run(NamedTuple):
    """One training: a cell of the table."""

    variant: str
    game: str
    seed: int

    @property
    def path(self) -> Path:
        """``VARIANT/GAME/sSEED``, a relative path."""
        game = self.game.replace("/", "_").replace(":", "_")
        return Path(self.variant, game, f"s{self.seed}")

    def __str__(self) -> str:
        return f"{self.variant}, {self.game}, seed {self.seed}"


class VariantSection(Section):
    """
    What is compared.

    :param overrides: values of the run's configuration by key path, such as ``hub.name``
    :param seeds: its own; None: the study's
    """

    overrides: dict[str, Any] = Field(default_factory=dict)
    seeds: Seeds | None = None


class MetricSection(Section):
    """
    How the runs are measured; lengths are shares of the run, so that they fit steps and seconds.

    :param n_points: of a learning curve
    :param window: a point of the curve is the mean return of the games that ended within it
    :param jump_start: games that ended within it tell the return at the start
    :param thresholds: of the time to threshold, as shares of the control's mean final return
    :param floors: the return of each game that counts as nothing, such as random play's; without
        one it is 0
    """

    n_points: Annotated[Integer, Field(ge=2)] = 40
    window: Share = 0.1
    jump_start: Share = 0.1
    thresholds: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...],
        Field(min_length=1),
    ] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
    floors: dict[str, float] = Field(default_factory=dict)


class StudyConfig(Section):
    """
    A table of runs: each variant on each game with each seed.

    :param config: complete configuration of a run that all start from
    :param n_timesteps: agent steps of each run
    :param games: Gymnasium ids
    :param seeds: of each variant that has none of its own
    :param control: the variant that the others are compared with
    :param overrides: for all variants, which may override them in turn
    :param variants: by name
    :param metric: how the runs are measured
    """

    config: Path
    n_timesteps: Count
    games: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Seeds
    control: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    variants: Annotated[dict[str, VariantSection], Field(min_length=1)]
    metric: MetricSection = MetricSection()

    @pydantic.model_validator(mode="after")
    def _check_names(self) -> Self:
        if self.control not in self.variants:
            raise ValueError(_unknown("control", self.control, list(self.variants)))
        for game in self.metric.floors:
            if game not in self.games:
                raise ValueError(_unknown("metric.floors", game, self.games))
        for where, values in self._unique():
            doubles = sorted({str(value) for value in values if values.count(value) > 1})
            if doubles:
                raise ValueError(f"{where} names {doubles[0]} twice")
        thresholds = list(self.metric.thresholds)
        if thresholds != sorted(set(thresholds)):
            raise ValueError(f"metric.thresholds is {thresholds}, allowed: numbers that ascend")
        taken: dict[str, Run] = {}
        for run in self.runs():
            other = taken.setdefault(str(run.path).lower(), run)  # as some file systems see it
            if other != run:
                raise ValueError(f"{other} and {run} would share a folder: rename one of them")
        _check_overrides("overrides", self.overrides)
        for name, variant in self.variants.items():
            _check_name(name)
            _check_overrides(f"variants.{name}.overrides", variant.overrides)
        return self

    def _unique(self) -> Iterator[tuple[str, Sequence[Any]]]:
        yield "games", self.games
        yield "seeds", self.seeds
        for name, variant in self.variants.items():
            yield f"variants.{name}.seeds", variant.seeds or ()

    def seeds_of(self, variant: str) -> tuple[int, ...]:
        """Its own, or the study's."""
        return self.variants[variant].seeds or self.seeds

    def runs(self) -> list[Run]:
        """All runs; first each variant's first seed, so that an unfinished table can be read."""
        most = max(len(self.seeds_of(variant)) for variant in self.variants)
        return [
            Run(variant, game, seeds[i])
            for i in range(most)
            for game in self.games
            for variant in self.variants
            if i < len(seeds := self.seeds_of(variant))
        ]

    def run_config(self, run: Run) -> RunConfig:
        """
        :raises ValueError: if an override's value is wrong
        """
        own = {"env.id": run.game, "train.seed": run.seed, "train.n_timesteps": self.n_timesteps}
        overrides = {**self.overrides, **self.variants[run.variant].overrides, **own}
        try:
            return load_config(self.config, overrides)
        except ValueError as error:
            raise ValueError(f"variant {run.variant}: {error}") from None


def load_study(file: Path) -> StudyConfig:
    """
    Read a study; ``config`` and the files of hubs are relative to the file's folder.

    :raises ValueError: if the file can't be read, or a key or a value is wrong; one line
    """
    data = read_mapping(file)
    try:
        study = parse(StudyConfig, data)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    config = file.parent / study.config
    if not config.is_file():
        raise ValueError(f"{file}: config is {str(study.config)!r}, but there is no file {config}")
    variants = {
        name: variant.model_copy(update={"overrides": _found(variant.overrides, file.parent)})
        for name, variant in study.variants.items()
    }
    overrides = _found(study.overrides, file.parent)
    return study.model_copy(update={"config": config, "overrides": overrides, "variants": variants})


def _found(overrides: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Where ``hub.name`` is a file of the study's folder, its path."""
    name = overrides.get("hub.name")
    if not isinstance(name, str):
        return dict(overrides)
    hubs = {name, name.rpartition(":")[0] or name}  # HUB or HUB:ENCODER
    is_file = any((folder / hub).exists() for hub in hubs) and hubs.isdisjoint(list_hubs())
    return {**overrides, "hub.name": str((folder / name).resolve())} if is_file else dict(overrides)


def _unknown(where: str, name: str, allowed: Sequence[str]) -> str:
    return f"{where} names {name!r}{closest(name, allowed)}, allowed: {', '.join(allowed)}"


def _check_name(variant: str) -> None:
    """It names a folder and a line of the figures."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.+=-]*", variant):
        raise ValueError(f"variant {variant!r}: a name has letters, digits and any of _ . + = -")


def _check_overrides(where: str, overrides: Mapping[str, Any]) -> None:
    """Keys of a run that exist, and that the study doesn't set itself."""
    for path in overrides:
        if path in OWN_KEYS:
            raise ValueError(f"{where} sets {path}, but {OWN_KEYS[path]} of the study does that")
        check_override(RunConfig, path, where)
