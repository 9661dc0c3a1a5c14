"""The report of a study: ``report.md`` with the numbers, and all that it takes to repeat them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hubrl.files import read_json
from hubrl.origin import command_line, commit
from hubrl.run_folder import CONFIG_FILE
from hubrl.sections import read_mapping
from hubrl.studies.config import StudyConfig
from hubrl.studies.engines import Job
from hubrl.studies.figures import FIGURES
from hubrl.studies.results import ALL, AXES, CURVES_FILE, SUMMARY_FILE, Results, Row, Table

REPORT_FILE = "report.md"
#: Columns of the tables: metric of the summary, heading.
COLUMNS = {
    "area": "area under the curve",
    "final": "final return",
    "start": "return at the start",
    "area_ratio": "area / control's",
    "final_ratio": "final / control's",
    "jump_start": "jump-start",
    "probability_of_improvement": "P(improvement)",
    "negative_transfer": "worse than the control",
}
HOW_TO_READ = """\
Numbers are means over seeds for one game, and interquartile means over games and seeds for all
games, where an area counts in the control's mean area on that game and a final return or a start
in the control's mean final return. In brackets: 95 % percentile intervals of the stratified
bootstrap over seeds (Agarwal et al. 2021, arXiv 2108.13264). A cell without brackets comes from a
game with a single seed: nothing is known about its spread. With fewer than about 5 seeds these
intervals are too narrow. A ratio is unbounded, or unknown, where the control is not above the
floor, be it in some resamples. Area: mean return while learning. Jump-start: mean return at the
start minus the control's; empty where a run had no game until then. Time: the median, never if half
of the runs never came. P(improvement): that a random seed's area is above a random one of the
control. Worse than the control (negative transfer): the interval of the difference of the areas
lies below 0; games and variants are not corrected for being many. At equal seconds the curves of
a game end where its fastest run ended; seconds depend on what else the machine did."""


class Source(NamedTuple):
    """A study's files as they were when it was read: they may be edited while it trains."""

    file: Path
    study: str
    config: str


def read_source(study: StudyConfig, file: Path) -> Source:
    """
    :param file: of the study
    """
    return Source(file, file.read_text(), study.config.read_text())


def write_report(
    study: StudyConfig, source: Source, results: Results, done: Sequence[Job], folder: Path
) -> None:
    """
    Write ``report.md``.

    :param done: the complete runs
    :param folder: for the results
    """
    parts = [
        f"# Study {source.file.stem}",
        _origin(study, done),
        *_notes(study, done),
        *(_axis(study, table) for table in results.tables.values()),
        *_without_seconds(results.no_seconds),
        "## How to read the numbers",
        HOW_TO_READ,
        f"All numbers are in [{SUMMARY_FILE}]({SUMMARY_FILE}), all curves in "
        f"[{CURVES_FILE}]({CURVES_FILE}).",
        "## The study",
        f"`{source.file}`:",
        f"```yaml\n{source.study.strip()}\n```",
        f"`{study.config.name}`, which all runs start from:",
        f"```yaml\n{source.config.strip()}\n```",
    ]
    (folder / REPORT_FILE).write_text("\n\n".join(parts) + "\n")


def _without_seconds(why: str | None) -> list[str]:
    return [] if why is None else ["## At equal seconds", f"Not measured: {why}."]


def _origin(study: StudyConfig, done: Sequence[Job]) -> str:
    commits = sorted({_facts(job).get("commit", "unknown") for job in done})
    seeds = {
        name: dict.fromkeys(job.run.seed for job in done if job.run.variant == name)
        for name in study.variants
    }
    metric = study.metric
    variants = ", ".join(f"{name} ({' '.join(map(str, seeds[name]))})" for name in seeds)
    return "\n".join(
        [
            f"- command: `{command_line('python', '-m', 'hubrl.study')}`",
            f"- commit: trained at {', '.join(commits)}; measured at {commit()}",
            f"- games: {', '.join(study.games)}; {study.n_timesteps:,} agent steps each",
            f"- variants (seeds of complete runs): {variants}",
            f"- control: {study.control}",
            f"- measured at {metric.n_points} points, in windows of {metric.window:g} of a run; "
            f"jump-start: the first {metric.jump_start:g}; returns that count as nothing: "
            + (", ".join(f"{game} {x:g}" for game, x in metric.floors.items()) or "0"),
        ]
    )


def _notes(study: StudyConfig, done: Sequence[Job]) -> Iterator[str]:
    """What a reader must know before the numbers."""
    ran = {job.run for job in done}
    missing = [run for run in study.runs() if run not in ran]
    if missing:
        yield "**Not complete:** " + "; ".join(map(str, missing)) + "."
    counts = Counter((run.variant, run.game) for run in ran)
    if any(len({counts[name, game] for game in study.games}) > 1 for name in study.variants):
        yield "In the table of all games each game counts by its number of runs."
    configs = [read_mapping(job.folder / CONFIG_FILE) for job in done]
    lengths = {config["train"]["n_timesteps"] for config in configs} - {study.n_timesteps}
    if lengths:
        yield (
            f"**Some runs have {', '.join(f'{n:,}' for n in sorted(lengths))} agent steps,** of "
            f"which the first {study.n_timesteps:,} are measured; what falls over a run, such as a "
            "learning rate, falls over its whole length."
        )
    precisions = {config["hub"]["precision"] for config in configs}
    if len(precisions) > 1:
        yield f"**Runs differ in hub.precision:** {', '.join(sorted(precisions))}."
    for variant in study.variants:
        weights = {_facts(job).get("weights") for job in done if job.run.variant == variant}
        if len(weights) > 1:
            yield f"**The hub of {variant} got other weights between its runs.**"


def _facts(job: Job) -> dict[str, Any]:
    return read_json(job.facts) if job.facts.exists() else {}


def _axis(study: StudyConfig, table: Table) -> str:
    unit = AXES[table.axis]
    parts = [f"## At equal {unit}"]
    if len(study.games) > 1:
        parts += ["### All games", _table(table, ALL), _times(study, table, ALL)]
    for game in study.games:
        end = f"{table.grids[game][-1]:,.0f} {unit}"
        heading = f"### {game}, {end}"
        parts += [heading, _table(table, game), _times(study, table, game)]
    parts += [f"![{title}]({name}_{table.axis}.png)" for name, (title, _) in FIGURES.items()]
    return "\n\n".join(parts)


def _table(table: Table, game: str) -> str:
    measured = {row.metric for row in table.rows if row.game == game}
    columns = {metric: title for metric, title in COLUMNS.items() if metric in measured}
    lines = [["variant", "runs", *columns.values()]]
    for variant in table.variants(game):
        rows = [table.row(game, variant, metric) for metric in columns]
        n_runs = next(str(row.n_runs) for row in rows if row)
        lines.append([variant, n_runs, *map(_text, rows)])
    return _markdown(lines)


def _times(study: StudyConfig, table: Table, game: str) -> str:
    """Median time to each threshold."""
    levels = study.metric.thresholds
    lines = [[f"time to ... of {study.control}'s final return", *(f"{x:g}" for x in levels)]]
    for variant in table.variants(game):
        rows = [table.row(game, variant, f"time_to_{level:g}") for level in levels]
        lines.append([variant, *map(_text, rows)])
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


def _text(row: Row | None) -> str:
    if row is None:
        return ""
    if row.metric == "negative_transfer":
        return "unknown: 1 seed" if row.value is None else ("**yes**" if row.value else "no")
    if row.value is None:
        return "unknown" if row.metric.endswith("ratio") else ""
    without_end = "never" if row.metric.startswith("time_to") else "unbounded"
    text, *ends = (
        _number(value, without_end) for value in (row.value, row.low, row.high) if value is not None
    )
    return f"{text} [{', '.join(ends)}]" if ends else text


def _number(value: float, without_end: str) -> str:
    """
    :param without_end: what infinity is called
    """
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return without_end
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
