"""The run folder's files."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import small_config

from agents.config import load_config
from agents.runs import create_run, default_run_dir, derive_seed, make_logger, open_run
from hubrl.files import DamagedFileError
from hubrl.run_folder import CsvTable, check_new_run, note_command


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_new_column_keeps_the_old_rows(tmp_path: Path) -> None:
    table = CsvTable(tmp_path / "a.csv", "step", 0)
    table.append({"step": 1, "x": 0.5})
    table.append({"step": 2, "x": 0.25, "name": 'a,"b'})
    table.append({"step": 3})
    assert read(tmp_path / "a.csv") == [
        {"step": "1", "x": "0.5", "name": ""},
        {"step": "2", "x": "0.25", "name": 'a,"b'},
        {"step": "3", "x": "", "name": ""},
    ]


def test_a_resumed_table_forgets_later_rows(tmp_path: Path) -> None:
    table = CsvTable(tmp_path / "a.csv", "step", 0)
    assert table.last_step == 0
    for step in (10, 20, 30):
        table.append({"step": step})
    table = CsvTable(tmp_path / "a.csv", "step", 20)
    assert table.last_step == 20
    table.append({"step": 25, "x": 1})
    assert [row["step"] for row in read(tmp_path / "a.csv")] == ["10", "20", "25"]
    assert CsvTable(tmp_path / "a.csv", "step", 5).last_step == 0
    assert not (tmp_path / "a.csv").exists()


def test_the_log_goes_on_after_a_resume(tmp_path: Path) -> None:
    logger = make_logger(tmp_path, 0)
    for step in (100, 200):
        logger.record("time/total_timesteps", step, exclude="tensorboard")
        logger.record("x/loss", step / 1000)
        logger.dump(step)
    logger.close()
    logger = make_logger(tmp_path, 100)
    logger.record("time/total_timesteps", 150)
    logger.dump(150)
    logger.close()
    assert [row["time/total_timesteps"] for row in read(tmp_path / "progress.csv")] == [
        "100",
        "150",
    ]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"step,x\r\n1,2\r\nmany,3\r\n", r"a\.csv has 'many' as step, allowed: a number; put"),
        (b"step,x\r\nnan,3\r\n", r"a\.csv has 'nan' as step, allowed: a number; put the file"),
        (b"x,y\r\n1,2\r\n", r"a\.csv has None as step, allowed: a number; put the file back"),
        (b"step,x\r\n1\r\n", r"a\.csv: row 1 has not one cell for each column: put the file back"),
        (b"step\r\n1,2\r\n", r"a\.csv: row 1 has not one cell for each column: put the file"),
        (b"step\r\n\xff\r\n", r"a\.csv is no CSV table: put the file back, or move it away to go"),
        (b"step\r\n" + b"1" * 200_000 + b"\r\n", r"a\.csv is no CSV table: put the file back"),
    ],
)
def test_a_table_that_holds_something_else(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DamagedFileError, match=message):
        CsvTable(tmp_path / "a.csv", "step", 10)
    assert (tmp_path / "a.csv").read_bytes() == content


def test_a_row_that_was_cut_short_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the machine lost its power."""
    table = CsvTable(tmp_path / "a.csv", "step", 0)
    for step in (10, 20):
        table.append({"step": step, "x": step / 2})
    content = (tmp_path / "a.csv").read_bytes()
    (tmp_path / "a.csv").write_bytes(content + b"30,1")
    assert CsvTable(tmp_path / "a.csv", "step", 100).last_row == {"step": "20", "x": "10.0"}
    assert capsys.readouterr().err.endswith("a.csv: its last line has no end and is left out\n")
    assert (tmp_path / "a.csv").read_bytes() == content


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"env.id": "ALE/Pong-v5", "train.seed": 3}, "ppo-Pong-v5-none-s3-2"),
        ({"hub.name": "hub5/hub.yaml"}, "ppo-hubrl_TinyImage-v0-hub5-s0-2"),
        ({"hub.name": "hub5:a"}, "ppo-hubrl_TinyImage-v0-hub5_a-s0-2"),
        (
            {"hub.name": "hub5", "hub.random_init": True},
            "ppo-hubrl_TinyImage-v0-hub5-random-s0-2",
        ),
    ],
)
def test_default_run_dir(
    overrides: dict[str, Any], name: str, hub5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hub5.parent)
    assert str(default_run_dir(small_config(overrides=overrides))).startswith(f"runs/{name}")


def test_a_run_is_opened_as_it_was_created(tmp_path: Path) -> None:
    config = small_config()
    check_new_run(tmp_path)
    create_run(tmp_path / "run", config)
    assert open_run(tmp_path / "run") == config
    note_command(tmp_path / "run")
    note_command(tmp_path / "run")
    first, second = (tmp_path / "run" / "command.txt").read_text().splitlines()
    assert first == second != ""
    with pytest.raises(ValueError, match=r"run-dir .*run exists; .* continue it by --resume"):
        check_new_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"is not the folder of a run: it has no config.yaml"):
        open_run(tmp_path)


def test_a_run_that_is_older_than_a_key_does_what_it_did(tmp_path: Path) -> None:
    config = small_config("ppo")
    create_run(tmp_path / "run", config)
    file = tmp_path / "run" / "config.yaml"
    data = yaml.safe_load(file.read_text())
    for key in ("always_active", "aggregation", "freeze_layers", "standardise"):
        del data["hub"][key]
    file.write_text(yaml.safe_dump(data))
    hub = open_run(tmp_path / "run").hub
    assert (hub.always_active, hub.aggregation, hub.freeze_layers) == ((), "concat", 0)
    assert not hub.standardise
    with pytest.raises(ValueError, match=r"keys hub\.always_active, .* are missing"):
        load_config(file)


def test_derived_seeds_differ() -> None:
    seeds = {derive_seed(seed, purpose) for seed in (0, 1) for purpose in ("evaluate", "export")}
    assert len(seeds) == 4
    assert derive_seed(0, "evaluate") == derive_seed(0, "evaluate")


def test_two_commands_do_not_share_a_folder(tmp_path: Path) -> None:
    create_run(tmp_path / "run", small_config())
    with pytest.raises(ValueError, match=r"run-dir .*run was made by another command; give anot"):
        create_run(tmp_path / "run", small_config())
