"""The bench command around its measurements: medians, goals, files, mistakes."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from hubrl import bench
from hubrl.bench import Bench, Result


@pytest.fixture
def two_results(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        Result("toy.update", 0.5, 0.46, 5.0, 10.0, "ms"),
        Result("toy.speed", 0.9, 0.8, 900.0, 1000.0, "steps/s"),
    ]
    names = tuple(result.name for result in results)
    monkeypatch.setattr(bench, "BENCHES", (Bench(names, lambda: results),))


def test_median_of_interleaved_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    calls: list[str] = []
    durations = {"a": iter([9, 9, 1, 3, 2]), "b": iter([9, 9, 10, 30, 20])}
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)

    def side(name: str) -> None:
        nonlocal now
        calls.append(name)
        now += next(durations[name])

    seconds = bench.interleave({"a": lambda: side("a"), "b": lambda: side("b")}, rounds=3)
    assert seconds == {"a": 2, "b": 20}
    assert calls == ["a", "b"] * 5


@pytest.mark.parametrize(
    ("unit", "ratio", "is_met"),
    [("ms", 0.46, True), ("ms", 0.47, False), ("steps/s", 0.46, True), ("steps/s", 0.45, False)],
)
def test_times_should_be_low_and_speeds_high(unit: str, ratio: float, is_met: bool) -> None:
    assert Result("x", ratio, 0.46, ratio, 1.0, unit).is_met is is_met


def test_results_are_printed_and_written(two_results: None, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = CliRunner().invoke(bench.command, ["all", "--json", str(file)])
    assert done.exit_code == 0
    assert "MISSED" in done.output
    assert "met" in done.output
    rows = json.loads(file.read_text())
    assert [row["name"] for row in rows] == ["toy.update", "toy.speed"]
    assert set(rows[0]) == {"name", "ratio", "goal", "ours", "theirs", "unit", "machine"}
    assert {"cpu", "cores", "torch", "precision"} <= set(rows[0]["machine"])


def test_a_name_chooses_one_result(two_results: None) -> None:
    output = CliRunner().invoke(bench.command, ["toy.speed"]).output
    assert "toy.speed" in output
    assert "toy.update" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toi"], "bench 'toi' is unknown, allowed: all, toy.update, toy.speed"),
        (["all", "--json", "/nowhere/x.json"], "--json /nowhere/x.json: there is no folder"),
    ],
)
def test_mistakes_exit_2(two_results: None, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(bench.command, arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_dispatch_measures_something() -> None:
    result = bench._dispatch("x", goal=1.0, batch=4, backward=True, precision="float32")
    assert result.ours > 0
    assert result.ratio == result.ours / result.theirs
