"""Studies as data: what a file may say, and the table of runs that it means."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_study

from hubrl.specs import load_hub
from hubrl.studies.config import Run, load_study

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
GUIDE = ROOT / "docs" / "when-a-hub-helps.md"


def test_the_table_of_runs(tmp_path: Path) -> None:
    games = ["hubrl/TinyImage-v0", "module:Other-v0"]
    variants = {"none": {}, "fast": {"seeds": [7, 8, 9]}}
    study = load_study(small_study(tmp_path, games=games, seeds=[0, 1], variants=variants))
    runs = study.runs()
    assert len(runs) == len(set(runs)) == 2 * (2 + 3)
    first = [("none", games[0], 0), ("fast", games[0], 7), ("none", games[1], 0)]
    assert [tuple(run) for run in runs[:3]] == first, "a first seed of everything comes first"
    assert runs[-1] == Run("fast", games[1], 9)
    assert runs[-1].path == Path("fast/module_Other-v0/s9")
    assert str(runs[0]) == "none, hubrl/TinyImage-v0, seed 0"


def test_what_a_run_is_configured_by(tmp_path: Path) -> None:
    overrides = {"hub.top_k": 1, "algorithm.gamma": 0.5}
    variants = {"none": {}, "other": {"overrides": {"algorithm.gamma": 0.6}}}
    study = load_study(small_study(tmp_path, overrides=overrides, variants=variants))
    none = study.run_config(Run("none", "hubrl/TinyImage-v0", 3))
    other = study.run_config(Run("other", "hubrl/TinyImage-v0", 3))
    assert (none.hub.top_k, none.algorithm.gamma) == (1, 0.5)
    assert (other.hub.top_k, other.algorithm.gamma) == (1, 0.6)
    assert (none.env.id, none.train.seed, none.train.n_timesteps) == ("hubrl/TinyImage-v0", 3, 64)


def test_the_study_in_the_docs(tmp_path: Path) -> None:
    """And what it leaves out."""
    (block,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    text = textwrap.dedent(block)
    assert text.startswith("config: configs/agents/ppo-atari.yaml\n")
    file = tmp_path / "mine.yaml"
    file.write_text(text.replace("config: ", f"config: {GUIDE.parents[1]}/"))
    study = load_study(file)
    assert len(study.runs()) == 6
    assert {study.run_config(run).hub.name for run in study.runs()} == {"none", "atari5:contrast"}
    assert (study.metric.n_points, study.metric.window, study.metric.floors) == (40, 0.1, {})


def test_a_hub_beside_the_study(hub5: Path) -> None:
    variants = {
        "none": {},
        "beside": {"overrides": {"hub.name": hub5.name}},
        "member": {"overrides": {"hub.name": f"{hub5.name}:a"}},
        "shipped": {"overrides": {"hub.name": "atari5"}},
        "shipped-member": {"overrides": {"hub.name": "atari5:contrast"}},
    }
    (hub5.parent / "atari5").mkdir()  # a shipped hub's name wins
    study = load_study(small_study(hub5.parent, variants=variants))
    names = {run.variant: study.run_config(run).hub.name for run in study.runs()}
    assert names["beside"] == str(hub5)
    assert names["member"] == f"{hub5}:a"
    assert names["shipped"] == "atari5"
    assert names["shipped-member"] == "atari5:contrast"


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_study_is_valid(file: Path) -> None:
    study = load_study(file)
    hubs = {study.run_config(run).hub.name for run in study.runs()}
    assert all(load_hub(hub).encoders for hub in hubs - {"none"})


def of_none(**section: Any) -> dict[str, Any]:
    return {"variants": {"none": section}}


METRIC = {"n_points": 4, "window": 0.5, "jump_start": 0.5, "thresholds": [1.0], "floors": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamse": []}, r"unknown key gamse \(closest: 'games'\), keys: config, n_timesteps"),
        (of_none(sedes=[1]), r"unknown key variants.none.sedes \(closest: 'seeds'\), keys: over"),
        ({"metric": METRIC | {"windo": 1}}, r"unknown key metric.windo \(closest: 'window'\)"),
        (
            {"metric": METRIC | {"window": 1.5}},
            "metric.window is 1.5, allowed: a number above 0 and at most 1",
        ),
        ({"n_timesteps": 0}, "n_timesteps is 0, allowed: a whole number at least 1"),
        ({"games": []}, r"games is \[\], allowed: .* at least 1 item"),
        ({"seeds": [-1]}, "seeds is -1, allowed: greater than or equal to 0"),
        ({"seeds": [1, 2, 1]}, "seeds names 1 twice"),
        ({"games": ["a", "a"]}, "games names a twice"),
        (of_none(seeds=[4, 4]), "variants.none.seeds names 4 twice"),
        (
            {"games": ["a/b-v0", "a_B-v0"]},
            "none, a/b-v0, seed 0 and none, a_B-v0, seed 0 would share a folder: rename one",
        ),
        (
            {"variants": {"none": {}, "None": {}}},
            "none, hubrl/TinyImage-v0, seed 0 and None, hubrl/TinyImage-v0, seed 0 would share",
        ),
        (
            {"metric": METRIC | {"thresholds": [1.0, 0.5]}},
            r"metric.thresholds is \[1.0, 0.5\], allowed: numbers that ascend",
        ),
        ({"metric": METRIC | {"thresholds": [0.5, 0.5]}}, r"metric.thresholds is .*ascend"),
        ({"control": "nonee"}, r"control names 'nonee' \(closest: 'none'\), allowed: none, fast"),
        ({"metric": METRIC | {"floors": {"Pong": 1}}}, "metric.floors names 'Pong'"),
        (
            {"variants": {"none": {}, "a/b": {}}},
            "variant 'a/b': a name has letters, digits and any of",
        ),
        (
            of_none(overrides={"train.seed": 3}),
            "variants.none.overrides sets train.seed, but seeds of the study does that",
        ),
        (
            {"overrides": {"hubb.name": "none"}},
            r"overrides has the key 'hubb.name' \(closest: 'hub'\), allowed: SECTION.KEY with",
        ),
        ({"overrides": {"hub": "none"}}, "overrides has the key 'hub'.*allowed: SECTION.KEY"),
        ({"overrides": {"hub.a.b": 1}}, "overrides has the key 'hub.a.b', allowed: .* one dot"),
        ({"config": "base.yml"}, "config is 'base.yml', but there is no file"),
    ],
)
def test_wrong_studies(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_study(small_study(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_a_wrong_value_of_a_run_names_the_variant(tmp_path: Path) -> None:
    study = load_study(small_study(tmp_path, **of_none(overrides={"hub.topk": 2})))
    with pytest.raises(ValueError, match=r"variant none: unknown key hub.topk \(closest: 'top_k'"):
        study.run_config(study.runs()[0])


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"s.yaml must be a mapping of keys to values"):
        load_study(file)


def test_aliases_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("overrides: &x {}\nmetric: *x\n")
    with pytest.raises(ValueError, match=r"s.yaml, line 1, has the YAML anchor or alias 'x'"):
        load_study(file)
