"""Results of a study: hand-worked numbers of made-up runs, files, figures, the report."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import small_study, write_complete_run

from hubrl.plots import new_figure
from hubrl.studies import figures, results
from hubrl.studies.config import Run, StudyConfig, load_study
from hubrl.studies.engines import Job
from hubrl.studies.report import read_source, write_report
from hubrl.studies.results import ALL, Games, Table, measure

GAME, OTHER = "hubrl/TinyImage-v0", "hubrl/TinyImageContinuous-v0"


def games(*returns: float, speed: float = 1.0) -> Games:
    """A game every 16 steps; ``speed`` steps in a second."""
    steps = 16.0 * np.arange(1, len(returns) + 1)
    end = steps[-1]
    return Games(steps, steps / speed, np.array(returns, dtype=float), end, end / speed)


def study_of(folder: Path, **changes: Any) -> StudyConfig:
    """Of 64 steps, 4 points and a window and a start of half a run: two points."""
    return load_study(small_study(folder, **{"seeds": [0, 1]} | changes))


def value(table: Table, variant: str, metric: str, game: str = GAME) -> float | None:
    row = table.row(game, variant, metric)
    assert row is not None
    return row.value


def test_one_game_by_hand(tmp_path: Path) -> None:
    episodes = {
        Run("none", GAME, 0): games(0, 2, 4, 6),
        Run("none", GAME, 1): games(0, 2, 4, 8),
        Run("fast", GAME, 0): games(2, 4, 12, 20),
        Run("fast", GAME, 1): games(2, 4, 4, 4),
    }
    table = measure(study_of(tmp_path), episodes, "steps")
    assert table.grids[GAME].tolist() == [16, 32, 48, 64]
    assert table.cells["none", GAME].curve_PS.T.tolist() == [[0, 1, 3, 5], [0, 1, 3, 6]]
    assert table.cells["fast", GAME].curve_PS.T.tolist() == [[2, 3, 8, 16], [2, 3, 4, 4]]
    assert value(table, "none", "area") == (9 / 4 + 10 / 4) / 2
    assert value(table, "none", "final") == 5.5
    assert value(table, "none", "start") == 1
    assert value(table, "fast", "area_ratio") == pytest.approx((29 + 13) / (9 + 10))
    assert value(table, "fast", "final_ratio") == pytest.approx((16 + 4) / (5 + 6))
    assert value(table, "fast", "jump_start") == 3 - 1
    assert value(table, "fast", "probability_of_improvement") == 1
    assert value(table, "fast", "negative_transfer") == 0
    # Thresholds 2.75 and 5.5: "none" at 48, 48 and never, 64; "fast" at 32, 32 and 48, never.
    assert value(table, "none", "time_to_0.5") == 48
    assert value(table, "none", "time_to_1") == np.inf, "half of the runs never came"
    assert value(table, "fast", "time_to_0.5") == 32
    row = table.row(GAME, "fast", "time_to_1")
    assert row is not None
    assert (row.value, row.low, row.high) == (np.inf, 48, np.inf)
    assert (row.unit, row.n_runs) == ("agent steps", 2)


def test_a_floor_counts_as_nothing(tmp_path: Path) -> None:
    episodes = {
        Run("none", GAME, 0): games(-21, -21, -11, -11),
        Run("fast", GAME, 0): games(-21, -1, -1, -1),
    }
    metric = load_study(small_study(tmp_path)).metric.model_dump() | {"floors": {GAME: -21}}
    table = measure(study_of(tmp_path, metric=metric), episodes, "steps")
    # Curves over -21: 0, 0, 5, 10 and 0, 10, 20, 20.
    assert value(table, "fast", "area_ratio") == pytest.approx(50 / 15)
    assert value(table, "fast", "final_ratio") == pytest.approx(2)
    assert value(table, "none", "time_to_0.5") == 48


def test_a_control_below_the_floor(tmp_path: Path) -> None:
    episodes = {Run("none", GAME, 0): games(-21, -21, -21, -20)}
    message = rf"metric.floors: the control's final return of {GAME} is -20.5, not above the floor"
    with pytest.raises(ValueError, match=message):
        measure(study_of(tmp_path), episodes, "steps")


def test_no_game_at_the_start(tmp_path: Path) -> None:
    late = Games(np.array([60.0]), np.array([60.0]), np.ones(1), 64, 64)
    episodes = {Run("none", GAME, 0): games(1, 1, 1, 1), Run("fast", GAME, 0): late}
    table = measure(study_of(tmp_path), episodes, "steps")
    assert value(table, "fast", "start") is None
    assert value(table, "fast", "jump_start") is None
    assert value(table, "fast", "area_ratio") == 1
    assert value(table, "fast", "time_to_1") == 64, "not before its first game ended"
    episodes[Run("fast", GAME, 0)] = late._replace(steps=np.array([65.0]))
    message = (
        "fast, .*, seed 0: its first game ended after 65 agent steps, but its curve has 64: tr"
    )
    with pytest.raises(ValueError, match=message):
        measure(study_of(tmp_path), episodes, "steps")


def test_equal_seconds_end_with_the_fastest_run(tmp_path: Path) -> None:
    episodes = {
        Run("none", GAME, 0): games(1, 2, 3, 4, speed=2),
        Run("fast", GAME, 0): games(10, 20, 30, 40, speed=1),
    }
    table = measure(study_of(tmp_path), episodes, "seconds")
    assert table.grids[GAME].tolist() == [8, 16, 24, 32]
    assert table.cells["none", GAME].curve_PS[:, 0].tolist() == [1, 1.5, 2.5, 3.5]
    assert table.cells["fast", GAME].curve_PS[:, 0].tolist() == [10, 10, 10, 20]
    # A run whose last game lasts long is as long as it was.
    episodes[Run("fast", GAME, 0)] = games(10, speed=1)._replace(n_seconds=64)
    table = measure(study_of(tmp_path), episodes, "seconds")
    assert table.grids[GAME].tolist() == [8, 16, 24, 32]


def test_runs_that_are_longer_than_the_study(tmp_path: Path) -> None:
    """What came after its 64 steps counts neither in steps nor in seconds."""
    episodes = {
        Run("none", GAME, 0): games(1, 2, 3, 4, 50, 60, 70, 80, speed=2),
        Run("fast", GAME, 0): games(10, 20, 30, 40, 900, 900, 900, 900, speed=1),
    }
    study = study_of(tmp_path)
    assert value(measure(study, episodes, "steps"), "none", "final") == 3.5
    table = measure(study, episodes, "seconds")
    assert table.grids[GAME].tolist() == [8, 16, 24, 32]
    assert value(table, "none", "final") == 3.5
    between = study_of(tmp_path, n_timesteps=56)  # a game ends at 48 steps, one at 64
    table = measure(between, episodes, "seconds")
    assert table.grids[GAME].tolist() == [7, 14, 21, 28]
    # Where no game ended after it, too: of the 48 s after its last game it has a third.
    quiet = games(1, 2, 3, 4)._replace(n_steps=160, n_seconds=112)
    table = measure(study_of(tmp_path, n_timesteps=96), {Run("none", GAME, 0): quiet}, "seconds")
    assert table.grids[GAME].tolist() == [20, 40, 60, 80]


def test_negative_transfer(tmp_path: Path) -> None:
    episodes = {
        Run("none", GAME, 0): games(4, 4, 4, 4),
        Run("none", GAME, 1): games(5, 5, 5, 5),
        Run("fast", GAME, 0): games(1, 1, 1, 1),
        Run("fast", GAME, 1): games(2, 2, 2, 2),
    }
    study = study_of(tmp_path)
    assert value(measure(study, episodes, "steps"), "fast", "negative_transfer") == 1
    del episodes[Run("fast", GAME, 1)]
    table = measure(study, episodes, "steps")
    assert value(table, "fast", "negative_transfer") is None
    row = table.row(GAME, "fast", "area")
    assert row is not None
    assert (row.low, row.high) == (None, None), "one seed has no interval"


def test_all_games_count_alike(tmp_path: Path) -> None:
    study = study_of(tmp_path, games=[GAME, OTHER])
    episodes = {
        Run("none", GAME, 0): games(1, 1, 1, 1),
        Run("none", OTHER, 0): games(100, 100, 100, 100),
        Run("fast", GAME, 0): games(3, 3, 3, 3),
        Run("fast", OTHER, 0): games(200, 200, 200, 200),
    }
    table = measure(study, episodes, "steps")
    assert value(table, "fast", "area", ALL) == 2.5
    assert value(table, "fast", "area_ratio", ALL) == 2.5
    assert value(table, "fast", "jump_start", ALL) == 1.5
    assert value(table, "fast", "probability_of_improvement", ALL) == 1
    assert value(table, "fast", "time_to_1", ALL) == 0.25, "share of the run"
    del episodes[Run("fast", OTHER, 0)]
    table = measure(study, episodes, "steps")
    assert table.variants(ALL) == ["none"], "a variant without a game is in no aggregate"
    assert table.variants(GAME) == ["none", "fast"]


@pytest.fixture
def study(tmp_path: Path) -> StudyConfig:
    """Two games; of "fast" only one seed."""
    variants = {"none": {}, "fast": {"seeds": [0]}}
    return study_of(tmp_path, games=[GAME, OTHER], variants=variants)


def write_runs(study: StudyConfig, out: Path) -> list[Run]:
    for i, run in enumerate(study.runs()):
        rows = [(16 * n, float(n + i), 2.0 * n) for n in range(1, 5)]
        write_complete_run(out / "runs" / run.path, study.run_config(run), rows)
    return study.runs()


def write(study: StudyConfig, found: results.Results, done: list[Run], out: Path) -> str:
    """The report of a study that ``small_study`` has written."""
    jobs = [Job(run, out) for run in done]
    write_report(study, read_source(study, out / "small.yaml"), found, jobs, out / "results")
    return (out / "results" / "report.md").read_text()


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_files_and_figures(study: StudyConfig, tmp_path: Path) -> None:
    done = write_runs(study, tmp_path)
    found = results.collect(study, done, tmp_path, tmp_path / "results")
    figures.draw(study, found.tables, tmp_path / "results")
    write(study, found, done, tmp_path)
    curves = rows_of(tmp_path / "results" / "curves.csv")
    assert len(curves) == 2 * len(done) * study.metric.n_points
    assert list(curves[0].values()) == ["steps", GAME, "none", "0", "16", "1"]
    summary = rows_of(tmp_path / "results" / "summary.csv")
    (ratio,) = [
        row
        for row in summary
        if (row["axis"], row["game"], row["metric"]) == ("steps", GAME, "area_ratio")
    ]
    assert ratio["variant"] == "fast"
    assert (ratio["low"], ratio["high"], ratio["n_runs"]) == ("", "", "1")
    images = {path.name for path in (tmp_path / "results").glob("*.png")}
    names = ("curves", "ratios", "improvement", "thresholds")
    assert images == {f"{name}_{axis}.png" for name in names for axis in ("steps", "seconds")}
    report = (tmp_path / "results" / "report.md").read_text()
    for text in ("### All games", "unknown: 1 seed", "fast (0)", "none (0 1)", "n_points: 4"):
        assert text in report
    assert all(f"({image})" in report for image in images)
    assert "Not complete" not in report


def test_an_interval_without_end_is_an_arrow(study: StudyConfig, tmp_path: Path) -> None:
    """A marker without a bar would look like an interval of no width."""
    done = write_runs(study, tmp_path)
    table = results.collect(study, done, tmp_path, tmp_path / "results").tables["steps"]
    row = table.row(GAME, "fast", "area_ratio")
    assert row is not None
    for high, markers in ((9.0, ["o"]), (np.inf, [">", "o"])):
        panel = new_figure(3, 3).add_subplot()
        endless = row._replace(value=4.0, low=3.0, high=high)
        figures._intervals(panel, [endless], ["red"], 0.0, "o", "area")
        *shown, _ = [line for line in panel.lines if line.get_marker() != "None"]
        assert [line.get_marker() for line in shown] == markers
        (bar,) = [line for line in panel.lines if line.get_marker() == "None"]
        assert list(bar.get_xdata()) == [3.0, 9.0 if high == 9.0 else 5.0]


def test_an_unknown_interval_is_a_hollow_marker(study: StudyConfig, tmp_path: Path) -> None:
    done = write_runs(study, tmp_path)
    table = results.collect(study, done, tmp_path, tmp_path / "results").tables["steps"]
    row = table.row(GAME, "fast", "area_ratio")
    assert row is not None
    panel = new_figure(3, 3).add_subplot()
    unknown = row._replace(value=4.0, low=np.nan, high=np.nan)
    figures._intervals(panel, [unknown], ["red"], 0.0, "o", "area")
    marker, _ = panel.lines
    assert marker.get_markerfacecolor() == "white"


def test_the_same_runs_give_the_same_bytes(
    study: StudyConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "FIGURES", {"curves": figures.FIGURES["curves"]})
    done = write_runs(study, tmp_path)
    for name in ("a", "b"):
        tables = results.collect(study, done, tmp_path, tmp_path / name).tables
        figures.draw(study, {"steps": tables["steps"]}, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_report_says_what_is_missing_or_mixed(study: StudyConfig, tmp_path: Path) -> None:
    done = write_runs(study, tmp_path)[:-1]
    config = tmp_path / "runs" / done[0].path / "config.yaml"
    config.write_text(config.read_text().replace("precision: float32", "precision: bfloat16"))
    jobs = [Job(run, tmp_path) for run in done]
    jobs[0].facts.parent.mkdir(parents=True)
    jobs[0].facts.write_text('{"commit": "abc", "weights": "w"}')
    found = results.collect(study, done, tmp_path, tmp_path / "results")
    report = write(study, found, done, tmp_path)
    assert f"**Not complete:** none, {OTHER}, seed 1." in report
    assert "In the table of all games each game counts by its number of runs." in report
    assert "**Runs differ in hub.precision:** bfloat16, float32." in report
    assert "**The hub of none got other weights between its runs.**" in report
    assert "trained at abc, unknown; measured at" in report


def test_ratios_without_a_unit_and_starts_without_a_game(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    returns = {("none", 0): (0, 0), ("none", 1): (6, 8), ("fast", 0): (1, 3), ("fast", 1): (1, 3)}
    for run in study.runs():
        first, last = returns[run.variant, run.seed]
        rows = [(48, float(first), 6.0), (64, float(last), 8.0)]
        write_complete_run(tmp_path / "runs" / run.path, study.run_config(run), rows)
    found = results.collect(study, study.runs(), tmp_path, tmp_path / "results")
    # Areas: 0 and 25 / 4, and 5 / 4 twice. Where both resampled controls are 0 there is no ratio.
    assert "| 0.4 [0.2, unbounded] |" in write(study, found, study.runs(), tmp_path)
    starts = [row for row in found.tables["steps"].rows if row.metric in ("start", "jump_start")]
    assert {row.value for row in starts} == {None}


def test_runs_that_cannot_be_measured_at_equal_seconds(study: StudyConfig, tmp_path: Path) -> None:
    for run in study.runs():
        seconds = 1.0 if run.variant == "none" else 100.0
        rows = [(48, 1.0, seconds), (64, 2.0, seconds)]
        write_complete_run(tmp_path / "runs" / run.path, study.run_config(run), rows)
    found = results.collect(study, study.runs(), tmp_path, tmp_path / "results")
    assert list(found.tables) == ["steps"]
    report = write(study, found, study.runs(), tmp_path)
    assert "Not measured: fast, " in report
    assert "its first game ended after 100 seconds, but its curve has 1: train all runs" in report
    assert {row["axis"] for row in rows_of(tmp_path / "results" / "summary.csv")} == {"steps"}


def test_a_run_is_as_long_as_its_progress_says(study: StudyConfig, tmp_path: Path) -> None:
    run = write_runs(study, tmp_path)[0]
    folder = tmp_path / "runs" / run.path
    assert results.read_games(folder).n_seconds == 8
    (folder / "progress.csv").write_text("time/total_timesteps,time/seconds\n32,4\n64,9.5\n")
    assert results.read_games(folder).n_seconds == 9.5
    (folder / "progress.csv").write_text("time/total_timesteps,train/loss\n32,4\n")
    assert results.read_games(folder).n_seconds == 8, "of a run that is older than the column"


def test_runs_that_cannot_be_read(study: StudyConfig, tmp_path: Path) -> None:
    done = write_runs(study, tmp_path)
    file = tmp_path / "runs" / done[1].path / "episodes.csv"
    file.write_text("timesteps,return,length,seconds\n")
    with pytest.raises(ValueError, match=rf"the run {file.parent} has no game in episodes.csv"):
        results.collect(study, done, tmp_path, tmp_path / "results")
    file.unlink()
    with pytest.raises(ValueError, match=rf"the run {file.parent} has no episodes.csv; delete it"):
        results.collect(study, done, tmp_path, tmp_path / "results")
    rest = [run for run in done if run.variant != "none"]
    with pytest.raises(ValueError, match=rf"control 'none' has no complete run of {GAME} in"):
        results.collect(study, rest, tmp_path, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_more_variants_than_colours_look_different(tmp_path: Path) -> None:
    names = ["none", *(f"v{i}" for i in range(20))]
    study = study_of(tmp_path, variants={name: {} for name in names})
    looks = {tuple(figures._look(study, name).values()) for name in names}
    assert len(looks) == len(names)
