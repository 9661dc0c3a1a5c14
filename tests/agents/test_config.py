"""Configurations: complete, strict, plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from agents.config import (
    UNFIT_ALGORITHMS,
    Schedule,
    algorithm_names,
    built_in_config,
    dump_config,
    load_config,
    parse_config,
)


@pytest.mark.parametrize("name", algorithm_names())
def test_built_in_configs_are_complete_and_repeat(name: str) -> None:
    config = load_config(built_in_config(name))
    assert config.algorithm.name == name
    assert config.train.n_timesteps == 1_000_000
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_ppo_has_the_values_of_rl_zoo() -> None:
    config = load_config(built_in_config("ppo"))
    ppo = config.algorithm
    assert config.env.n_envs == 8
    assert (ppo.n_steps, ppo.n_epochs, ppo.batch_size) == (128, 4, 256)
    assert (ppo.vf_coef, ppo.ent_coef, ppo.gamma, ppo.gae_lambda) == (0.5, 0.01, 0.99, 0.95)
    assert (ppo.learning_rate(1.0), ppo.learning_rate(0.0)) == (2.5e-4, 0.0)
    assert (ppo.clip_range(1.0), ppo.clip_range(0.5)) == (0.1, 0.05)


def test_overrides_win_over_the_file() -> None:
    config = load_config(built_in_config("ppo"), {"train.seed": "3", "hub.freeze": "all"})
    assert config.train.seed == 3
    assert config.hub.freeze == ("all",)


@pytest.mark.parametrize("value", [1e7, "1e7", 10_000_000, "10000000"])
def test_a_number_without_a_dot_is_a_number(value: object) -> None:
    config = load_config(built_in_config("ppo"), {"train.n_timesteps": value})
    assert config.train.n_timesteps == 10_000_000


@pytest.mark.parametrize(
    ("data", "start", "end"),
    [
        (0.1, 0.1, 0.1),
        ("1e-3", 1e-3, 1e-3),
        ({"linear": 0.1}, 0.1, 0.0),
        ({"start": 0.1, "end": 0.02}, 0.1, 0.02),
    ],
)
def test_schedules(data: object, start: float, end: float) -> None:
    schedule = Schedule.model_validate(data)
    assert (schedule(1.0), schedule(0.0)) == (start, end)
    assert schedule(0.25) == pytest.approx(0.25 * start + 0.75 * end)
    assert schedule(-0.1) == end, "SB3's last rollout may pass the end"
    assert Schedule.model_validate(schedule.model_dump()) == schedule


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("algorithm.lerning_rate", 1, r"unknown key algorithm.lerning_rate \(closest: 'learning_"),
        ("train.n_timestep", 1, r"unknown key train.n_timestep \(closest: 'n_timesteps'\), keys: "),
        ("algorithm.clip_range", {"lin": 1}, "unknown key algorithm.clip_range.lin"),
        ("train.n_timesteps", -5, "train.n_timesteps is -5, allowed: a whole number at least 1$"),
        ("train.n_timesteps", "many", "train.n_timesteps is 'many', allowed: a whole number"),
        ("env.n_envs", 2.5, "env.n_envs is 2.5, allowed: a whole number at least 1$"),
        ("algorithm.gamma", 1.5, "algorithm.gamma is 1.5, allowed: a number .* 0 and at most 1$"),
        ("algorithm.max_grad_norm", 0, "algorithm.max_grad_norm is 0, allowed: a number above 0$"),
        ("algorithm.learning_rate", "fast", "learning_rate.start is 'fast', allowed: a number at"),
        ("algorithm.vf_coef", float("inf"), "algorithm.vf_coef is inf, allowed: a"),
        ("hub.precision", "float16", "hub.precision is 'float16', allowed: 'auto', 'float32' or"),
        ("algorithm.name", "pppo", r"algorithm.name is 'pppo' \(closest: 'ppo'\), allowed: ppo, "),
        ("hub.always_active", 3, r"hub.always_active is 3, allowed: a name or a list of names"),
        ("hub.freeze", [1], r"hub.freeze is 1, allowed: a valid string"),
        ("algorithm.name", ["ppo"], r"algorithm.name is \['ppo'\].*allowed: ppo, "),
        ("train.seed", 2**32, "train.seed is 4294967296, allowed: a whole number at least 0 and"),
    ],
)
def test_a_wrong_key_or_value_is_one_clear_line(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_config(built_in_config("ppo"), {path: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["much", -1])
def test_a_number_or_a_word(value: object) -> None:
    message = r"ent_coef is .*, allowed: a number at least 0, or 'auto'$"
    with pytest.raises(ValueError, match=message):
        load_config(built_in_config("sac"), {"algorithm.ent_coef": value})


@pytest.mark.parametrize("name", UNFIT_ALGORITHMS)
def test_refused_algorithms_say_why(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' can't train a hub: it "):
        built_in_config(name)


def test_a_missing_key_is_named() -> None:
    data = yaml.safe_load(built_in_config("ppo").read_text())
    del data["train"]["seed"]
    with pytest.raises(ValueError, match=r"key train\.seed is missing"):
        parse_config(data)
    del data["algorithm"]
    with pytest.raises(ValueError, match=r"keys algorithm, train\.seed are missing: a conf"):
        parse_config(data)


def test_ppo_needs_a_rollout_of_two_steps() -> None:
    overrides: dict[str, Any] = {"algorithm.n_steps": 1, "env.n_envs": 1}
    with pytest.raises(ValueError, match=r"n_steps \* env.n_envs is 1, but PPO needs"):
        load_config(built_in_config("ppo"), overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML: while parsing"),
        ("- 1", "must be a mapping of keys to values"),
        ("a: &x [1]\nb: [*x, *x]", "has the YAML anchor or alias 'x', allowed: none; write out"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(file)


@pytest.mark.parametrize("text", ["1: x", "no: x", "a: [{null: x}]", "a: {b: {2026-01-01: x}}"])
def test_keys_are_texts(text: str, tmp_path: Path) -> None:
    """YAML takes ``no`` for false."""
    file = tmp_path / "x.yaml"
    file.write_text(built_in_config("ppo").read_text() + text)
    with pytest.raises(ValueError, match=r"x\.yaml has the key .*, allowed: text; quote it"):
        load_config(file)


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("env: !!python/object/apply:os.getcwd []")
    with pytest.raises(ValueError, match=r"line 1, has the YAML tag .*os\.getcwd"):
        load_config(file)


@pytest.mark.parametrize(
    ("algorithm", "values", "message"),
    [
        ("maskable_ppo", {"n_steps": 257}, r"env.n_envs is 257, of which maskable_ppo would norm"),
        ("recurrent_ppo", {"n_steps": 257}, r"change algorithm.n_steps or algorithm.batch_size"),
        ("a2c", {"n_steps": 1, "normalize_advantage": True}, r"or algorithm.normalize_advantage"),
    ],
)
def test_one_advantage_is_not_normalised(
    algorithm: str, values: dict[str, Any], message: str
) -> None:
    """It has no deviation, and SB3's update would be NaN."""
    overrides = {f"algorithm.{key}": value for key, value in values.items()} | {"env.n_envs": 1}
    if algorithm != "a2c":
        overrides["algorithm.batch_size"] = 256
    with pytest.raises(ValueError, match=message):
        load_config(built_in_config(algorithm), overrides)
    load_config(built_in_config(algorithm), overrides | {"algorithm.normalize_advantage": False})
    plain = {"algorithm.n_steps": 257, "algorithm.batch_size": 256, "env.n_envs": 1}
    load_config(built_in_config("ppo"), plain)


def test_tqc_keeps_a_quantile() -> None:
    overrides = {"algorithm.n_quantiles": 2, "algorithm.top_quantiles_to_drop_per_net": 2}
    message = "top_quantiles_to_drop_per_net is 2, allowed: less than n_quantiles, 2"
    with pytest.raises(ValueError, match=message):
        load_config(built_in_config("tqc"), overrides)
