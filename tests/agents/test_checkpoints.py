"""Checkpoints bring back weights, optimizers and numbers, and hold no pickle."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sb3_agents import optimizers_of, parameters_of
from small_hubs import nature_spec, write_hub
from small_runs import renew_manifest, small_config, small_env
from stable_baselines3.common.base_class import BaseAlgorithm

from agents.algorithms import ALGORITHMS, build_model
from agents.checkpoints import BestCheckpoint, load_checkpoint, save_checkpoint
from hubrl import state_folder
from hubrl.files import file_sha256, read_json
from hubrl.specs import load_hub, save_hub
from hubrl.state_folder import has_state, read_state, repair_state


def build(algorithm: str, hub: Path | str = "none", seed: int = 0) -> BaseAlgorithm:
    overrides = {"hub.name": str(hub), "train.seed": seed}
    return build_model(small_config(algorithm, overrides), small_env(algorithm=algorithm))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("hub", [pytest.param("none", marks=pytest.mark.slow), "hub5"])
def test_every_algorithm_survives_save_and_load(
    algorithm: str, hub: str, hub5: Path, tmp_path: Path
) -> None:
    name = hub5 if hub == "hub5" else hub
    model, other = build(algorithm, name).learn(100), build(algorithm, name, seed=1)
    save_checkpoint(model, tmp_path / "last", {"mean_return": 2.5})
    assert {file.suffix for file in (tmp_path / "last").iterdir()} == {".safetensors", ".json"}
    assert [file.name for file in tmp_path.iterdir() if "last" in file.name] == ["last"]

    load_checkpoint(other, tmp_path / "last")
    best = read_state(tmp_path / "last", BestCheckpoint)
    assert best == {"mean_return": 2.5}
    assert other.num_timesteps == model.num_timesteps >= 100
    assert other._n_updates == model._n_updates > 0
    assert list(other.ep_info_buffer or ()) == list(model.ep_info_buffer or ()) != []
    for mine, loaded in zip(
        model.policy.state_dict().values(), other.policy.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, loaded)
    images = np.random.default_rng(0).integers(256, size=(8, 4, 36, 36)).astype(np.uint8)
    expected = model.predict(images, deterministic=True)[0]
    np.testing.assert_array_equal(other.predict(images, deterministic=True)[0], expected)

    # The optimizer goes on as if nothing had been.
    for agent in (model, other):
        for optimizer in optimizers_of(agent).values():
            assert optimizer.state_dict()["state"]
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(0)
            for parameter in parameters_of(optimizer):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.param_groups[0]["lr"] = 0.01
            optimizer.step()
    for mine, loaded in zip(model.policy.parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(mine, loaded)


def test_a_checkpoint_that_is_replaced_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a training that goes on beside an evaluation."""
    first, second, reader = build("a2c").learn(100), build("a2c", seed=1).learn(132), build("a2c")
    save_checkpoint(first, tmp_path / "last", {})

    def replace_then_load(file: Path) -> object:
        monkeypatch.undo()
        save_checkpoint(second, tmp_path / "last", {})
        return state_folder.load_file(file)

    monkeypatch.setattr(state_folder, "load_file", replace_then_load)
    load_checkpoint(reader, tmp_path / "last")
    assert reader.num_timesteps == second.num_timesteps != first.num_timesteps
    for mine, loaded in zip(second.policy.parameters(), reader.policy.parameters(), strict=True):
        assert torch.equal(mine, loaded)


@pytest.mark.parametrize("value", [math.nan, "nan"])
def test_a_checkpoint_with_a_number_that_equals_none(value: float | str, tmp_path: Path) -> None:
    """A return may be NaN, as an environment's reward was, or a stranger wrote it."""
    model, other = build("a2c").learn(100), build("a2c")
    save_checkpoint(model, tmp_path / "last", {})
    state = read_json(tmp_path / "last" / "state.json")
    state["episodes"][0][0] = value
    (tmp_path / "last" / "state.json").write_text(json.dumps(state))
    renew_manifest(tmp_path / "last")
    load_checkpoint(other, tmp_path / "last")
    assert other.num_timesteps == model.num_timesteps
    assert other.ep_info_buffer
    assert math.isnan(other.ep_info_buffer[0]["r"])


def test_shared_tensors_are_stored_once(tmp_path: Path) -> None:
    """PPO's state dict names its features extractor three times."""
    model = build("ppo")
    save_checkpoint(model, tmp_path / "last", {})
    keys = load_file(tmp_path / "last" / "policy.safetensors")
    assert len([key for key in keys if key.endswith("cnn.0.weight")]) == 1
    assert len(keys) == len(list(model.policy.parameters()))


def test_dqn_keeps_its_exploration_rate(tmp_path: Path) -> None:
    model, other = build("dqn").learn(100), build("dqn")
    assert model.exploration_rate == pytest.approx(0.01)
    save_checkpoint(model, tmp_path / "last", {})
    load_checkpoint(other, tmp_path / "last")
    assert other.exploration_rate == model.exploration_rate


def test_a_crash_while_saving_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("a2c")
    save_checkpoint(model, tmp_path / "last", {"number": 1})
    monkeypatch.setattr(state_folder, "write_tensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(model, tmp_path / "last", {"number": 2})
    monkeypatch.undo()
    load_checkpoint(model, tmp_path / "last")
    assert read_json(tmp_path / "last" / "state.json")["number"] == 1
    save_checkpoint(model, tmp_path / "last", {"number": 3})
    assert read_json(tmp_path / "last" / "state.json")["number"] == 3


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    model, folder = build("a2c"), tmp_path / "last"
    save_checkpoint(model, folder, {"number": 1})
    folder.rename(tmp_path / "last.1")
    assert not has_state(tmp_path / "best")
    assert has_state(folder)
    load_checkpoint(model, folder)
    repair_state(folder)
    assert read_json(folder / "state.json")["number"] == 1


def test_frozen_encoders_must_be_those_of_the_training(tmp_path: Path, hub5: Path) -> None:
    def frozen() -> BaseAlgorithm:
        overrides = {"hub.name": str(hub5), "hub.freeze": ["b"]}
        return build_model(small_config("ppo", overrides), small_env())

    save_checkpoint(frozen(), tmp_path / "last", {})
    write_hub(hub5, [nature_spec(name) for name in "bacde"])  # other random numbers for each
    names = "has the encoders a, b, c, d, e, but the hub has b, a, c, d, e"
    with pytest.raises(ValueError, match=names):
        load_checkpoint(frozen(), tmp_path / "last")
    save_checkpoint(frozen(), tmp_path / "last", {})
    replace_weights(hub5, "b")
    with pytest.raises(ValueError, match=r"with frozen encoder 'b' of sha256 \w{12}..., but the h"):
        load_checkpoint(frozen(), tmp_path / "last")


def replace_weights(folder: Path, name: str) -> None:
    """New random numbers for one encoder, and their sha256 in its card."""
    hub, file = load_hub(folder), folder / f"{name}.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, file)
    specs = [
        dataclasses.replace(spec, sha256=file_sha256(file)) if spec.name == name else spec
        for spec in hub.encoders
    ]
    save_hub(dataclasses.replace(hub, encoders=tuple(specs)), folder)


def test_damaged_checkpoints_are_refused(tmp_path: Path, hub5: Path) -> None:
    model, folder = build("ppo").learn(32), tmp_path / "last"
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*last \(no readable state"):
        load_checkpoint(model, folder)
    save_checkpoint(model, folder, {})

    with pytest.raises(ValueError, match="has the encoders none, but the hub has a, b, c, d, e"):
        load_checkpoint(build("ppo", hub5), folder)
    file = folder / "policy.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "action_net" not in key}, file)
    renew_manifest(folder)
    with pytest.raises(ValueError, match=r"can't be loaded: '?no tensor action_net"):
        load_checkpoint(model, folder)
    save_file(tensors | {"more": torch.zeros(1)}, file)
    renew_manifest(folder)
    with pytest.raises(ValueError, match=r"can't be loaded: '?unknown tensor"):
        load_checkpoint(model, folder)
    file.write_bytes(file.read_bytes()[:1000])
    renew_manifest(folder)
    with pytest.raises(ValueError, match=r"policy.safetensors can't be loaded: Error while des"):
        load_checkpoint(model, folder)
    file.unlink()
    renew_manifest(folder)
    with pytest.raises(ValueError, match=r"policy.safetensors can't be loaded: No such file"):
        load_checkpoint(model, folder)
