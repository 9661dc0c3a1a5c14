"""The bench command around its measurements: medians, goals, files, mistakes."""

import inspect
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from hubrl import bench
from hubrl.bench import BENCHES, Bench
from hubrl.benches.measuring import GOALS, Result, compare, interleave, timed


@pytest.fixture
def three_results(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        Result("toy.update", 0.5, 0.46, 5.0, 10.0, "ms"),
        Result("toy.speed", 0.9, 0.8, 900.0, 1000.0, "steps/s"),
        Result("toy.beside", 0.9, None, 9.0, 10.0, "ms"),
    ]
    names = tuple(result.name for result in results)
    monkeypatch.setattr(bench, "BENCHES", (Bench(names, lambda device: results),))


def test_names_and_goals_of_the_table() -> None:
    assert GOALS == {
        "dispatch.update": 0.42,
        "dispatch.update32": 0.42,
        "dispatch.rollout": 0.55,
        "dispatch.rollout8": 0.65,
        "generator": 0.25,
        "hub_size": 1.05,
        "hub_size.trained": 1.25,
        "hub_size.optimizer": None,
        "ppo.trained": 1.2,
        "ppo.frozen": 4,
        "ppo.none": 2.5,
        "ppo.script": None,
        "dqn.trained": 1,
        "dqn.frozen": 2,
        "dqn.script": None,
        "env": 2.5,
        "env.cpu": None,
        "cache": 0.25,
        "load": 1.1,
        "memory": 1.1,
    }
    assert [name for each in BENCHES for name in each.names] == list(GOALS)


def test_median_of_interleaved_measurements() -> None:
    calls: list[str] = []
    values = {"a": iter([9, 9, 1, 3, 2]), "b": iter([9, 9, 10, 30, 20])}

    def measure(side: str) -> float:
        calls.append(side)
        return next(values[side])

    medians = interleave({"a": lambda: measure("a"), "b": lambda: measure("b")}, rounds=3)
    assert medians == {"a": 2, "b": 20}
    assert calls == list("abbaabbaab")


def test_seconds_of_a_clock() -> None:
    now = 5.0

    def run() -> None:
        nonlocal now
        now += 3.0

    assert timed(run, clock=lambda: now)() == 3.0


def test_the_ratio_is_ours_by_theirs() -> None:
    assert compare("env", 30.0, 10.0, "steps/s") == Result("env", 3.0, 2.5, 30.0, 10.0, "steps/s")


@pytest.mark.parametrize("unit", ["ms", "s", "MB"])
def test_prices_should_be_low(unit: str) -> None:
    assert Result("x", 0.46, 0.46, 0.46, 1.0, unit).is_met is True
    assert Result("x", 0.47, 0.46, 0.47, 1.0, unit).is_met is False


def test_speeds_should_be_high() -> None:
    assert Result("x", 0.46, 0.46, 0.46, 1.0, "steps/s").is_met is True
    assert Result("x", 0.45, 0.46, 0.45, 1.0, "steps/s").is_met is False


def test_without_a_goal_nothing_is_met_or_missed() -> None:
    assert Result("x", 0.46, None, 0.46, 1.0, "ms").is_met is None


def test_results_are_printed_and_written(three_results: None, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = CliRunner().invoke(bench.command, ["all", "--json", str(file)])
    assert done.exit_code == 0
    assert "MISSED" in done.output
    assert "met" in done.output
    rows = json.loads(file.read_text())
    assert [row["name"] for row in rows] == ["toy.update", "toy.speed", "toy.beside"]
    assert set(rows[0]) == {"name", "ratio", "goal", "ours", "theirs", "unit", "machine"}
    assert [row["goal"] for row in rows] == [0.46, 0.8, None]
    assert {"cpu", "cores", "torch", "precision"} <= set(rows[0]["machine"])


def test_a_bench_that_fails_takes_no_others_with_it(
    three_results: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(device: str) -> list[Result]:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(bench, "BENCHES", (*bench.BENCHES, Bench(("late",), fail)))
    done = CliRunner().invoke(bench.command, ["all", "--json", str(tmp_path / "bench.json")])
    assert isinstance(done.exception, RuntimeError)
    assert len(json.loads((tmp_path / "bench.json").read_text())) == 3


def test_networks_run_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str] = []

    def measure(device: str) -> list[Result]:
        devices.append(device)
        return []

    monkeypatch.setattr(bench, "BENCHES", (Bench(("toy",), measure),))
    assert CliRunner().invoke(bench.command, ["toy", "--device", "cpu"]).exit_code == 0
    assert devices == ["cpu"]
    for each in BENCHES:
        assert ("device" in inspect.signature(each.measure).parameters) == each.has_networks


def test_a_name_chooses_one_result(three_results: None) -> None:
    output = CliRunner().invoke(bench.command, ["toy.speed"]).output
    assert "toy.speed" in output
    assert "toy.update" not in output.partition("...")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toi"], "bench 'toi' is unknown, allowed: all, toy.update, toy.speed, toy.beside"),
        (["all", "--json", "/nowhere/x.json"], "--json /nowhere/x.json: there is no folder"),
        (["all", "--json", "/"], "--json / is a folder: give a file"),
        (["all", "--device", "abacus"], "--device is 'abacus', allowed on this machine: auto, cpu"),
    ],
)
def test_mistakes_exit_2(three_results: None, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(bench.command, arguments)
    assert done.exit_code == 2
    assert message in done.output
