"""Tables and figures of finished image runs: numbers by hand, and pictures that are not empty."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats
from small_images import quadrant_data, small_vision_config, write_rgb_hub

from hubrl import cli
from hubrl.run_folder import create_folder
from hubrl.signals import StopSignal
from vision_tasks import figures, report, runs
from vision_tasks.config import dump_config
from vision_tasks.results import (
    best_single,
    learning_curves,
    read_runs,
    scores_by_coefficient,
    summarise,
)
from vision_tasks.routing import routing
from vision_tasks.runs import build, load_data
from vision_tasks.training import Trainer

SCORES = {
    "hub-pathway": {1: 0.80, 2: 0.84, 3: 0.88},
    "single:a": {1: 0.78, 2: 0.80, 3: 0.85},
    "single:b": {1: 0.90},
}


RESULTS = {
    "method": "hub-pathway",
    "task": "classification",
    "data": "fashion-mnist",
    "seed": 1,
    "train_seconds": 10.0,
    "validation": {"": {"accuracy": 0.5, "loss": 1.0}},
    "test": {"": {"accuracy": 0.5, "loss": 1.0}},
}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """Folders of finished runs with made-up scores."""
    for method, by_seed in SCORES.items():
        for seed, score in by_seed.items():
            _write(tmp_path / "runs" / f"{method}-{seed}", method, seed, score)
    return tmp_path / "runs"


def _write(
    folder: Path, method: str, seed: int, score: float, hub: str = "rgb", **overrides: object
) -> None:
    config = small_vision_config(Path(hub), method, train__seed=seed, **overrides)
    create_folder(folder, dump_config(config))
    # On validation single:a is the best.
    validation = {"accuracy": 0.99 if method == "single:a" else 0.5, "loss": 1.0}
    results = RESULTS | {
        "method": method,
        "data": config.data.name,
        "seed": seed,
        "train_seconds": 10.0 * seed,
        "validation": {"": validation},
        "test": {"": {"accuracy": score, "loss": 1.0}},
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "epochs.csv").write_text(
        f"step,phase,validation/accuracy\n3,train,0.4\n6,train,{score}\n"
    )


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.run(report.command, "python -m vision_tasks.report", [str(arg) for arg in args])
    return int(stop.value.code or 0)


def test_scores_that_not_all_runs_have(finished: Path, tmp_path: Path) -> None:
    for name, more in {
        "hub-pathway-1": ["x", "y"],
        "hub-pathway-2": ["x"],
        "single:b-1": [],
    }.items():
        file = finished / name / "results.json"
        results = json.loads(file.read_text())
        results["test"][""] |= dict.fromkeys(more, 0.25)
        file.write_text(json.dumps(results))
    (finished / "hub-pathway-3" / "results.json").unlink()
    assert run(finished, "--out", tmp_path / "out") == 0
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    head, _, *rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert head[2:5] == ["test accuracy", "x", "validation"]
    assert {row[0]: row[3].split(" ")[0] for row in rows} == {
        "| hub-pathway": "25.00",
        "| single:a": "",
        "| single:b": "",
    }
    assert {len(row) for row in rows} == {len(head)}


def test_rows_by_hand(finished: Path) -> None:
    rows = {row.method: row for row in summarise(read_runs(finished))}
    assert list(rows) == ["single:b", "hub-pathway", "single:a"]  # by test score
    ours = list(SCORES["hub-pathway"].values())
    low, high = stats.t.interval(0.95, 2, np.mean(ours), stats.sem(ours))
    assert rows["hub-pathway"].test == pytest.approx((0.84, low, high), abs=1e-4)
    differences = np.subtract(ours, list(SCORES["single:a"].values()))
    low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    assert rows["single:a"].difference == pytest.approx((0.03, low, high), abs=1e-4)
    assert rows["single:b"].difference == (pytest.approx(-0.10), None, None)
    assert rows["hub-pathway"].difference is None
    assert rows["single:a"].seconds == 20.0


def test_the_best_single_encoder_is_not_chosen_by_test(finished: Path) -> None:
    best = best_single(summarise(read_runs(finished)), "fashion-mnist")
    assert best is not None
    assert best.method == "single:a"


def test_settings_in_which_runs_differ_are_named(finished: Path) -> None:
    _write(finished / "other", "hub-pathway", 1, 0.7, hub__exploration_coef=0.0)
    methods = {run.method for run in read_runs(finished) if "hub" in run.method}
    assert methods == {
        "hub-pathway (exploration_coef=0.3)",
        "hub-pathway (exploration_coef=0.0)",
    }


def test_settings_that_change_no_number_are_no_difference(finished: Path) -> None:
    _write(finished / "swapped", "hub-pathway", 4, 0.8, hub__swap=2, train__n_rollbacks=2)
    _write(finished / "single:a-4", "single:a", 4, 0.7)
    rows = {row.method: row for row in summarise(read_runs(finished))}
    assert set(rows) == {"hub-pathway", "single:a", "single:b"}
    assert rows["hub-pathway"].seeds == rows["single:a"].seeds == (1, 2, 3, 4)


def test_a_single_encoder_named_with_its_hub(finished: Path) -> None:
    _write(finished / "c", "single", 1, 0.95, hub="rgb:c")
    rows = {row.method: row for row in summarise(read_runs(finished))}
    assert rows["single:c"].difference == (pytest.approx(0.80 - 0.95), None, None)


def test_settings_are_named_between_folders_too(finished: Path, tmp_path: Path) -> None:
    _write(tmp_path / "other", "hub-pathway", 1, 0.7, hub__exploration_coef=0.0)
    runs = read_runs(finished / "hub-pathway-1", tmp_path / "other", tmp_path / "other")
    assert [(run.method, run.test) for run in runs] == [
        ("hub-pathway (exploration_coef=0.0)", 0.7),
        ("hub-pathway (exploration_coef=0.3)", 0.8),
    ]


@pytest.mark.parametrize("method", ["ensemble-i", "model-soup"])
def test_single_models_out_of_another_run(method: str, tmp_path: Path) -> None:
    """Those of a soup began with another one's head."""
    for epochs in (1, 2):
        folder = tmp_path / str(epochs)
        _write(folder, method, 1, 0.7, train__epochs=epochs)
        results = json.loads((folder / "results.json").read_text())
        for part in ("validation", "test"):
            results[part]["a"] = {"accuracy": 0.6, "loss": 1.0}
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "epochs.csv").write_text(
            "step,phase,validation/accuracy,validation/a/accuracy\n3,train,0.4,0.3\n"
        )
    found = {run.method: run for run in read_runs(tmp_path)}
    if method == "model-soup":
        assert list(found) == ["model-soup (epochs=1)", "model-soup (epochs=2)"]
        return
    label = "single:a (epochs=2)"
    assert found[label].test == 0.6
    assert learning_curves([found[label]]) == {"fashion-mnist": {label: {1: [(3, 0.3)]}}}


def test_a_curve_is_of_the_model_that_is_tested(tmp_path: Path) -> None:
    """Of distillation the student's, not its teachers'."""
    _write(tmp_path, "distill", 1, 0.7)
    (tmp_path / "epochs.csv").write_text(
        "step,phase,validation/accuracy\n3,teachers,0.8\n6,student,0.2\n9,student,0.7\n"
    )
    curves = learning_curves(read_runs(tmp_path))
    assert curves == {"fashion-mnist": {"distill": {1: [(6, 0.2), (9, 0.7)]}}}


def test_members_that_stopped_together_are_no_single_models(tmp_path: Path) -> None:
    _write(tmp_path, "ensemble-i", 1, 0.7, train__patience=3)
    results = json.loads((tmp_path / "results.json").read_text())
    for part in ("validation", "test"):
        results[part]["a"] = {"accuracy": 0.6, "loss": 1.0}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert [run.method for run in read_runs(tmp_path)] == ["ensemble-i", "ensemble-i:a"]


def test_each_method_is_compared_with_hub_pathway_of_its_settings(finished: Path) -> None:
    """A second hub, whose hub-pathway has one seed of a coefficient and two of another."""
    _write(finished / "a", "hub-pathway", 1, 0.60, "same")
    _write(finished / "b", "hub-pathway", 1, 0.70, "same", hub__exploration_coef=0.0)
    _write(finished / "c", "hub-pathway", 2, 0.80, "same", hub__exploration_coef=0.0)
    _write(finished / "d", "zoo-tuning", 1, 0.65, "same", hub__exploration_coef=0.0, hub__top_k=3)
    rows = {row.method: row for row in summarise(read_runs(finished))}
    ours = "hub-pathway (hub=same, exploration_coef=0.0)"
    zoo = rows["zoo-tuning (hub=same)"]
    assert (zoo.ours, zoo.difference) == (ours, (pytest.approx(0.05), None, None))
    other = rows["hub-pathway (hub=same, exploration_coef=0.3)"]
    assert (other.ours, other.difference) == (ours, (pytest.approx(0.10), None, None))
    single = rows["single:a (hub=rgb)"]
    assert single.ours == "hub-pathway (hub=rgb, exploration_coef=0.3)"
    assert single.difference is not None
    assert single.difference.mean == pytest.approx(0.03)
    assert rows[ours].difference is None


def test_a_hub_below_the_current_folder_is_named_from_there(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _write(finished / "a", "zoo-tuning", 1, 0.7, str(tmp_path / "hubs" / "same"))
    _write(finished / "b", "zoo-tuning", 2, 0.7, "/elsewhere/same")
    assert {run.method for run in read_runs(finished)} >= {
        "zoo-tuning (hub=hubs/same)",
        "zoo-tuning (hub=/elsewhere/same)",
    }


def test_a_coefficient_that_moves_has_no_place_among_numbers(finished: Path) -> None:
    _write(finished / "a", "hub-pathway", 1, 0.7, hub__exploration_coef={"linear": 0.3})
    found = read_runs(finished)
    assert "hub-pathway (exploration_coef=0.3 to 0)" in {run.method for run in found}
    assert scores_by_coefficient(found) == {}


def test_coefficients_of_runs_that_differ_in_nothing_else(finished: Path) -> None:
    _write(finished / "a", "hub-pathway", 1, 0.7, hub__exploration_coef=0.0)
    _write(finished / "b", "hub-pathway", 1, 0.6, train__epochs=9)
    assert scores_by_coefficient(read_runs(finished)) == {
        "fashion-mnist (epochs=2)": {0.0: [0.7], 0.3: [0.80, 0.84, 0.88]}
    }


def test_folders_of_images_are_other_data(finished: Path) -> None:
    for i, root in enumerate(("/d/birds", "/d/cars", "/e/cars")):
        data = {"data__name": "folder", "data__root": root}
        _write(finished / f"s{i}", "single:a", 1, 0.1 * i, **data)
        _write(finished / f"h{i}", "hub-pathway", 1, 0.1 * i, **data)
    _write(finished / "z", "hub-pathway", 4, 0.9, data__root="elsewhere")
    found = read_runs(finished)
    rows = summarise(found)
    own = ["folder-d-birds", "folder-d-cars", "folder-e-cars"]
    assert sorted({run.data for run in found}) == ["fashion-mnist", *own]
    assert [best_single(rows, data).test.mean for data in own] == [0.0, 0.1, 0.2]
    assert {row.method for row in rows if row.data in own} == {"single:a", "hub-pathway"}
    assert sorted(report._routed(rows, found)) == ["fashion-mnist", *own]
    for file in (finished / "s2", finished / "h2"):
        shutil.rmtree(file)
    assert {"folder-birds", "folder-cars"} < {run.data for run in read_runs(finished)}
    for file in (finished / "s1", finished / "h1"):
        shutil.rmtree(file)
    assert "folder" in {run.data for run in read_runs(finished)}


def _write_landmarks(folder: Path, method: str, nme: float) -> None:
    _write(folder, method, 1, 0.0)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("task: classification", "task: landmarks"))
    scores = {"": {"nme": nme, "failure_rate": 0.25, "auc": 0.5, "loss": 1.0}}
    results = json.loads((folder / "results.json").read_text())
    results |= {"task": "landmarks", "validation": scores, "test": scores}
    (folder / "results.json").write_text(json.dumps(results))


def test_landmarks_have_three_scores_and_less_error_is_better(tmp_path: Path) -> None:
    for method, nme in (("hub-pathway", 0.05), ("single:a", 0.06)):
        _write_landmarks(tmp_path / method, method, nme)
    found = read_runs(tmp_path)
    rows = summarise(found)
    assert [row.method for row in rows] == ["hub-pathway", "single:a"]
    assert rows[1].difference == (pytest.approx(0.01), None, None)
    text = report._markdown(rows, found)
    assert "| method | seeds | test nme | failure_rate | auc | validation | hub-pathway" in text
    assert "| single:a | 1 | 6.00 | 25.00 | 50.00 | 6.00 | 1.00 | 10 |" in text


def test_the_routing_of_landmarks_is_not_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_landmarks(tmp_path / "run", "hub-pathway", 0.05)
    assert run(tmp_path) == 0
    assert "no figure of the routing" not in capsys.readouterr().out


def test_one_trained_by_itself_comes_first(tmp_path: Path) -> None:
    _write(tmp_path / "a", "ensemble-i", 1, 0.7)
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    for part in ("validation", "test"):
        results[part]["a"] = {"accuracy": 0.6, "loss": 1.0}
    (tmp_path / "a" / "results.json").write_text(json.dumps(results))
    _write(tmp_path / "b", "single:a", 1, 0.65)
    rows = {row.method: row for row in summarise(read_runs(tmp_path))}
    assert rows["single:a"].test.mean == 0.65


def test_without_curves_or_data(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for file in finished.glob("*/epochs.csv"):
        file.unlink()

    def missing(*_: object) -> None:
        raise FileNotFoundError("no such images")

    monkeypatch.setattr(report, "routing", missing)
    assert run(finished, "--out", tmp_path / "out") == 0
    assert "no figure of the routing on fashion-mnist: no such images" in capsys.readouterr().out
    assert "curves.png" not in (tmp_path / "out" / "report.md").read_text()


def test_files_of_a_report(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(finished / "other", "hub-pathway", 1, 0.7, hub__exploration_coef=0.0)
    assert run(finished, "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| single:b | 1 | 90.00 | 50.00 |" in text
    assert "Best single encoder, by validation: single:a." in text
    assert "Differences are those of hub-pathway (exploration_coef=0.3)." in text
    with (tmp_path / "out" / "curves.csv").open() as lines:
        curves = list(csv.DictReader(lines))
    assert len(curves) == 16
    first = {"data": "fashion-mnist", "method": "single:b", "seed": "1", "step": "3"}
    assert first | {"validation": "0.4"} in curves
    with (tmp_path / "out" / "runs.csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == 8
    for name in ("scores", "curves", "exploration"):
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 5000


def test_a_report_needs_a_folder(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("")
    assert run(finished, "--out", tmp_path / "out") == 2
    assert "File exists" in capsys.readouterr().err


def test_a_folder_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 2
    assert "there is no finished run in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ("[]", "results.json is damaged: it must be a JSON mapping of keys to values"),
        ("{}", r"results.json has no method: put the file back"),
        (
            json.dumps(RESULTS | {"task": []}),
            r"results.json has task \[\] \(Input should be 'c",
        ),
        (json.dumps(RESULTS | {"seed": "x"}), r"results.json has seed 'x' \(Input should be a v"),
        (json.dumps(RESULTS | {"test": {"a": {}}}), "results.json has no score '': train that"),
        (json.dumps(RESULTS | {"test": {"": {}}}), "results.json has no score 'accuracy': train"),
    ],
)
def test_results_that_are_none(results: str, message: str, finished: Path) -> None:
    (finished / "hub-pathway-1" / "results.json").write_text(results)
    with pytest.raises(ValueError, match=message):
        read_runs(finished)


def test_curves_of_seeds_that_stopped_early_meet_at_the_steps_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, file: drawn.append(figure))
    # The second seed's first phase ended earlier.
    seeds = {1: [(3, 0.1), (6, 0.2), (9, 0.5)], 2: [(3, 0.3), (9, 0.7), (12, 0.8)]}
    figures.draw_curves({"a": {"distill": seeds}}, tmp_path / "curves.png")
    (line,) = drawn[0].axes[0].lines
    assert line.get_xydata() == pytest.approx(np.array([[3, 0.2], [9, 0.6]]))


def test_a_method_looks_the_same_in_all_panels_and_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, file: drawn.append(figure))
    curve = {1: [(3, 0.4), (6, 0.5)]}
    methods = [f"method{i}" for i in range(9)]  # more than colours
    panels = {"a": dict.fromkeys(methods, curve), "b": dict.fromkeys(methods[:3:-1], curve)}
    figures.draw_curves(panels, tmp_path / "curves.png")
    looks = [
        {line.get_label(): (line.get_color(), line.get_linestyle()) for line in panel.lines}
        for panel in drawn[0].axes
    ]
    assert len(set(looks[0].values())) == 9
    assert looks[1] == {name: looks[0][name] for name in methods[4:]}
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == methods
    assert all(panel.get_legend() is None for panel in drawn[0].axes)


def test_routing_is_what_the_method_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "load_classification", lambda *_: quadrant_data())
    hub = write_rgb_hub(tmp_path / "rgb")
    config = small_vision_config(hub)
    folder = tmp_path / "run"
    data, task = load_data(config)
    method = build(config, runs.load_vision_hub(str(hub), 36), task, folder)
    create_folder(folder, dump_config(config))
    Trainer(method, data, config, folder).run(StopSignal())
    found = routing(folder)
    np.testing.assert_allclose(found.usage_CE.sum(axis=1), 2.0)
    images, targets = data.validation.tensors  # type: ignore[attr-defined]
    method.eval()
    activated = method.model.route(images)[0].activated.numpy()
    for row, name in zip(found.usage_CE, found.classes, strict=True):
        mine = activated[targets.numpy() == "abcd".index(name)]
        expected = [(mine == i).any(axis=1).mean() for i in range(3)]
        np.testing.assert_allclose(row, expected)
    assert found.examples[0].shape == (36, 36, 3)
    cells = report._routing_cells(found)
    assert [row["class"] for row in cells] == list(found.classes)
    assert [list(row) for row in cells] == [["class", "a", "b", "c"]] * len(found.classes)
