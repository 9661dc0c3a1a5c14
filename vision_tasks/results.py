"""Finished runs: their scores, means over seeds, and hub-pathway's difference from each method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hubrl.files import DamagedFileError, checked, read_json
from hubrl.run_folder import cell_number, read_rows
from hubrl.specs import TIMM_PREFIX
from vision_tasks.methods import USED_BY
from vision_tasks.metrics import Interval, mean_over_seeds, paired_difference
from vision_tasks.runs import open_run
from vision_tasks.tasks import Classification, Landmarks
from vision_tasks.training import EPOCHS_FILE, RESULTS_FILE, Results

OURS = "hub-pathway"
TASKS: dict[str, type[Classification] | type[Landmarks]] = {
    "classification": Classification,
    "landmarks": Landmarks,
}
MORE_IS_BETTER = {task.metric: task.is_more_better for task in TASKS.values()}
#: Settings in which runs of one method may differ and still be the same method.
IGNORED = (
    "method",
    "data.root",  # of a data set of the user's own it is part of its name
    "hub.swap",  # gives the same numbers
    "train.seed",
    "train.device",
    "train.n_workers",
    "train.save_freq",
    "train.n_rollbacks",
)
COEFFICIENT = "hub.exploration_coef"
#: Methods whose runs give models of single encoders besides.
OF_SINGLES = ("ensemble-i", "logme")
#: What names a data set of the user's own, while others are the same wherever they lie.
FOLDER = "folder"

#: Settings by key path.
Settings = Mapping[str, Any]
#: Steps and scores by data set, method and seed.
Curves = dict[str, dict[str, dict[int, list[tuple[int, float]]]]]


class Run(NamedTuple):
    """A finished run, or one of the single models that an ensemble's run gives."""

    folder: Path
    data: str
    method: str
    """With the settings in which runs of this method differ."""
    member: str
    """Name of the model in the run's results; empty for the method's own."""
    seed: int
    metric: str
    validation: float
    test: float
    others: Mapping[str, float]
    """The other test scores."""
    seconds: float
    config: Settings


class Row(NamedTuple):
    """A method on a data set, over seeds."""

    data: str
    method: str
    metric: str
    seeds: tuple[int, ...]
    test: Interval
    others: Mapping[str, Interval]
    """Of the other test scores."""
    validation: Interval
    seconds: float
    ours: str | None
    """Hub-pathway that this method is compared with: the one that has its settings."""
    difference: Interval | None
    """Of that and this method on the seeds that both have; above 0 is better."""


def read_runs(*folders: Path) -> list[Run]:
    """
    The finished runs in some folders, at any depth; settings tell those of a data set apart.

    A hub's folder below the current one is named from here: others may be shown the report.

    Of a single model and a seed there is one: that which was trained by itself comes before the
    same out of an ensemble's run.

    :raises ValueError: if one's results or configuration are damaged
    """
    found = {file.resolve(): file for folder in folders for file in folder.rglob(RESULTS_FILE)}
    files = sorted(found.values())
    configs = {file: _settings_of(file.parent) for file in files}
    names = dict(zip(files, _data_names(list(configs.values())), strict=True))
    runs = []
    for file in files:
        results, config = checked(read_json(file), Results, file), configs[file]
        beside = [configs[other] for other in files if names[other] == names[file]]
        try:
            runs += _runs_of(file.parent, names[file], results, config, _label(config, beside))
        except KeyError as error:
            raise DamagedFileError(f"{file} has no score {error}: train that run again") from None
    first: dict[tuple[str, str, int], Run] = {}
    for run in sorted(runs, key=lambda run: run.member != ""):
        first.setdefault((run.data, run.method, run.seed), run)
    return [run for run in runs if run is first[run.data, run.method, run.seed]]


def summarise(runs: Sequence[Run]) -> list[Row]:
    """A row for each data set and method, the best first."""
    groups: dict[tuple[str, str], dict[int, Run]] = {}
    for run in runs:
        groups.setdefault((run.data, run.method), {})[run.seed] = run
    rows = [_row(by_seed, list(groups.values())) for by_seed in groups.values()]
    return sorted(rows, key=lambda row: (row.data, -_sign(row.metric) * row.test.mean))


def best_single(rows: Iterable[Row], data: str) -> Row | None:
    """By validation score."""
    singles = [row for row in rows if row.data == data and row.method.startswith("single:")]
    return max(singles, key=lambda r: _sign(r.metric) * r.validation.mean, default=None)


def learning_curves(runs: Sequence[Run]) -> Curves:
    """Validation scores by data set, method and seed, of the last phase of each run."""
    curves: Curves = {}
    for run in runs:
        rows = read_rows(run.folder / EPOCHS_FILE)
        # Before its last phase a method may be another model: of distillation its teachers.
        rows = [row for row in rows if row.get("phase") == rows[-1].get("phase")]
        column = "/".join(filter(None, ("validation", run.member, run.metric)))
        points = [_point(row, column, run.folder / EPOCHS_FILE) for row in rows if row.get(column)]
        if points:
            curves.setdefault(run.data, {}).setdefault(run.method, {})[run.seed] = points
    return curves


def scores_by_coefficient(runs: Sequence[Run]) -> dict[str, dict[float, list[float]]]:
    """
    Test scores of hub-pathway by exploration coefficient, for each data set and what else runs
    differ in.
    """
    ours = [
        run
        for run in runs
        if run.config["method"] == OURS and not isinstance(run.config[COEFFICIENT], dict)
    ]
    scores: dict[str, dict[float, list[float]]] = {}
    for run in ours:
        beside = [other.config for other in ours if other.data == run.data]
        rest = _label(run.config, beside, without=COEFFICIENT).removeprefix(OURS)
        by_coef = scores.setdefault(f"{run.data}{rest}", {})
        by_coef.setdefault(float(run.config[COEFFICIENT]), []).append(run.test)
    return {name: by_coef for name, by_coef in scores.items() if len(by_coef) > 1}


def _data_names(configs: Sequence[Settings]) -> list[str]:
    """Of several folders with the end of the path that tells them apart, as in ``folder-birds``."""
    parts = {str(c["data.root"]): Path(c["data.root"]).parts for c in configs if _is_own(c)}
    names = dict.fromkeys(parts, FOLDER)
    if len(parts) > 1:
        counts = range(1, max(map(len, parts.values())))
        n = next((n for n in counts if len({p[-n:] for p in parts.values()}) == len(parts)), 0)
        names = {root: "-".join([FOLDER, *p[-n:]]).replace("/", "") for root, p in parts.items()}
    return [names[str(c["data.root"])] if _is_own(c) else c["data.name"] for c in configs]


def _is_own(config: Settings) -> bool:
    return bool(config["data.name"] == FOLDER)


def _runs_of(folder: Path, data: str, results: Results, config: Settings, label: str) -> list[Run]:
    metric = TASKS[results["task"]].metric
    runs = []
    for name in results["test"] if results["method"] in OF_SINGLES else [""]:
        scores = results["test"][name]
        method = label if not name else _member_label(config, name, label)
        validation = results["validation"][name][metric]
        others = {key: each for key, each in scores.items() if key not in (metric, "loss")}
        fields = (folder, data, method, name, results["seed"], metric, validation)
        runs.append(Run(*fields, scores[metric], others, results["train_seconds"], config))
    return runs


def _relevant(config: Settings) -> Settings:
    """Settings that a run's scores depend on."""
    method = config["method"]
    return {
        key: value
        for key, value in config.items()
        if key not in IGNORED and method in USED_BY.get(key, (method,))
    }


def _label(config: Settings, beside: Sequence[Settings], without: str | None = None) -> str:
    """The method, with the settings in which runs of its data set differ."""
    all_settings = [_relevant(other) for other in beside]
    differing = {
        key: value
        for key, value in _relevant(config).items()
        if key != without and len({str(each[key]) for each in all_settings if key in each}) > 1
    }
    names = {key: "hub" if key == "hub.name" else key.split(".")[-1] for key in differing}
    settings = ", ".join(f"{names[key]}={_text(value)}" for key, value in differing.items())
    return f"{config['method']} ({settings})" if settings else str(config["method"])


def _text(value: Any) -> str:
    """A setting; schedules as "0.3 to 0"."""
    return f"{value['start']:g} to {value['end']:g}" if isinstance(value, dict) else str(value)


def _member_label(config: Settings, name: str, label: str) -> str:
    """As ``single:NAME`` where it is that, with the settings of its run."""
    method = str(config["method"])
    # Where training may stop early, an ensemble's members stop together.
    is_alone = method == "logme" or (method == "ensemble-i" and config["train.patience"] == 0)
    return f"{'single' if is_alone else method}:{name}{label.removeprefix(method)}"


def _row(by_seed: Mapping[int, Run], groups: Sequence[Mapping[int, Run]]) -> Row:
    runs = [by_seed[seed] for seed in sorted(by_seed)]
    first, ours = runs[0], _compared_with(runs[0], groups)
    common = [seed for seed in sorted(by_seed) if seed in ours]
    difference = None
    if common and ours is not by_seed:
        mine, theirs = ([g[s].test * _sign(first.metric) for s in common] for g in (ours, by_seed))
        difference = paired_difference(mine, theirs)
    shared = [name for name in first.others if all(name in run.others for run in runs)]
    others = {name: mean_over_seeds([run.others[name] for run in runs]) for name in shared}
    return Row(
        first.data,
        first.method,
        first.metric,
        tuple(sorted(by_seed)),
        mean_over_seeds([run.test for run in runs]),
        others,
        mean_over_seeds([run.validation for run in runs]),
        sum(run.seconds for run in runs) / len(runs),
        next(iter(ours.values())).method if difference is not None else None,
        difference,
    )


def _compared_with(run: Run, groups: Sequence[Mapping[int, Run]]) -> Mapping[int, Run]:
    """
    Hub-pathway with the settings of a run, by seed; of several that differ in what it alone uses,
    as the exploration coefficient, that which has the most seeds.
    """

    def shared(config: Settings) -> Settings:
        return {key: value for key, value in _relevant(config).items() if key not in USED_BY}

    ours = [
        group
        for group in groups
        for first in [next(iter(group.values()))]
        if (first.data, first.config["method"]) == (run.data, OURS)
        and shared(first.config) == shared(run.config)
    ]
    return max(ours, key=len, default={})


def _sign(metric: str) -> int:
    return 1 if MORE_IS_BETTER[metric] else -1


def _settings_of(folder: Path) -> Settings:
    config = _flat(open_run(folder).model_dump(mode="json"))
    hub, here = Path(config["hub.name"]), Path.cwd()
    if hub.is_relative_to(here):
        config["hub.name"] = str(hub.relative_to(here))
    name, colon, encoder = config["hub.name"].rpartition(":")
    if config["method"] == "single" and colon and not config["hub.name"].startswith(TIMM_PREFIX):
        config |= {"method": f"single:{encoder}", "hub.name": name}
    return config


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    return flat


def _point(row: Mapping[str, str], column: str, file: Path) -> tuple[int, float]:
    return int(cell_number(row, "step", file)), cell_number(row, column, file)
