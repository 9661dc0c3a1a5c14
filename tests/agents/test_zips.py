"""Agents of a user's own script: rebuilt from their zip without its pickles, and played."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import stat
import warnings
import zipfile
from base64 import b64encode
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_agents import AGENTS, make_agent
from sb3_contrib import TRPO, CrossQ
from small_hubs import nature_spec, write_hub
from small_runs import SMALL_OF, small_env
from stable_baselines3 import DQN, PPO, TD3
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.torch_layers import NatureCNN

import hubrl.evaluate
from agents.zips import algorithm_of, hub_of, rebuild
from envs import ImageFormat, make_vec_env, with_action_masks
from hubrl import cli
from hubrl.__main__ import group
from hubrl.saved_agents import policy_tensors


def env_of(name: str) -> Any:
    return (
        with_action_masks(small_env(algorithm=name))
        if "maskable" in name
        else small_env(algorithm=name)
    )


@pytest.mark.parametrize("name", AGENTS)
def test_every_algorithms_agent_acts_as_before(name: str, hub5: Path, tmp_path: Path) -> None:
    # Its own environment has other actions than TinyImage's: build it on that.
    agent = AGENTS[name]
    kwargs = {
        "features_extractor_class": hubrl.HubFeaturesExtractor,
        "features_extractor_kwargs": {
            "hub": str(hub5),
            "precision": "float32",
            "freeze": ["a"],
            "freeze_layers": 0,
        },
        "net_arch": [],
        **agent.policy_kwargs,
    }
    env = env_of(name)
    model = agent.model(agent.policy, env, policy_kwargs=kwargs, seed=0, **agent.settings)
    with torch.no_grad():  # as after learning: not the weights that a new agent begins with
        for weight in model.policy.parameters():
            weight += 0.01 * torch.randn_like(weight)
    model.save(tmp_path / "own.zip")
    assert hub_of(tmp_path / "own.zip") == str(hub5)
    assert algorithm_of(tmp_path / "own.zip") == name
    again = rebuild(tmp_path / "own.zip", name, env)
    images = np.random.default_rng(0).integers(256, size=(8, 4, 36, 36)).astype(np.uint8)
    expected, _ = model.predict(images, deterministic=True)
    np.testing.assert_array_equal(again.predict(images, deterministic=True)[0], expected)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"net_arch": [8], "activation_fn": torch.nn.ReLU},
        {"net_arch": [8], "activation_fn": torch.nn.ELU, "ortho_init": False},
        {"normalize_images": False},
        {"features_extractor_kwargs": {"features_dim": 32}},
    ],
)
@pytest.mark.parametrize("has_hub", [True, False])
def test_what_decides_an_agents_actions_is_taken(
    kwargs: dict[str, Any], has_hub: bool, hub5: Path, tmp_path: Path
) -> None:
    if has_hub:
        kwargs = {name: value for name, value in kwargs.items() if name != "normalize_images"}
        extractor = {"hub": str(hub5), "precision": "float32"}
        extractor |= kwargs.get("features_extractor_kwargs", {})
        kwargs = kwargs | {"features_extractor_kwargs": extractor}
        kwargs["features_extractor_class"] = hubrl.HubFeaturesExtractor
    env = small_env()
    model = PPO("CnnPolicy", env, policy_kwargs=kwargs, seed=0)
    model.save(tmp_path / "own.zip")
    again = rebuild(tmp_path / "own.zip", "ppo", env)
    images = torch.randint(0, 256, (8, 4, 36, 36), dtype=torch.uint8)
    for policy in (model.policy, again.policy):
        policy.set_training_mode(False)
    with torch.no_grad():
        mine, other = (m.policy.get_distribution(images).distribution for m in (model, again))
    torch.testing.assert_close(other.logits, mine.logits, atol=0, rtol=0)


def test_an_agent_that_plays_has_no_room_for_a_rollout(tmp_path: Path) -> None:
    env = small_env(3)
    PPO("CnnPolicy", env, n_steps=8, batch_size=24).save(tmp_path / "own.zip")
    again: Any = rebuild(tmp_path / "own.zip", "ppo", env)
    assert again.rollout_buffer.observations.nbytes < 10**6


def test_actions_are_sampled_as_often_as_in_training(tmp_path: Path) -> None:
    env = small_env()
    model = DQN("CnnPolicy", env, buffer_size=8)
    model.exploration_rate = 0.25
    model.save(tmp_path / "own.zip")
    again = rebuild(tmp_path / "own.zip", "dqn", env)
    assert isinstance(again, DQN)
    assert again.exploration_rate == 0.25


def test_td3_without_noise_is_no_ddpg(tmp_path: Path) -> None:
    env = small_env(algorithm="td3")
    TD3("CnnPolicy", env, target_noise_clip=0.0, buffer_size=8).save(tmp_path / "own.zip")
    assert algorithm_of(tmp_path / "own.zip") == "td3"
    rebuild(tmp_path / "own.zip", "td3", env)


def test_crossq_with_nature_cnn(tmp_path: Path) -> None:
    """It has a policy for vectors alone, whose own extractor is another."""
    env = small_env(algorithm="crossq")
    kwargs = {"features_extractor_class": NatureCNN, "net_arch": [8]}
    model = CrossQ("MlpPolicy", env, buffer_size=8, policy_kwargs=kwargs)
    model.save(tmp_path / "own.zip")
    again = rebuild(tmp_path / "own.zip", "crossq", env)
    images = np.random.default_rng(0).integers(256, size=(8, 4, 36, 36)).astype(np.uint8)
    expected, _ = model.predict(images, deterministic=True)
    np.testing.assert_array_equal(again.predict(images, deterministic=True)[0], expected)


def test_the_command_plays_a_zip(
    hub5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    env_id = SMALL_OF["ppo"].get("env.id", "hubrl/TinyImage-v0")
    kwargs = {
        "features_extractor_class": hubrl.HubFeaturesExtractor,
        "features_extractor_kwargs": {"hub": str(hub5), "precision": "float32"},
        "net_arch": [],
    }
    PPO("CnnPolicy", small_env(), policy_kwargs=kwargs, seed=0).save(tmp_path / "own.zip")
    arguments = [str(tmp_path / "own.zip"), "--env", env_id, "--episodes", "3"]
    file = tmp_path / "figures.json"
    hubrl.evaluate.command.main([*arguments, "--json", str(file)], standalone_mode=False)
    figures = json.loads(file.read_text())
    assert len(figures["returns"]) == 3
    assert f"own.zip, 3 games: mean return {np.mean(figures['returns']):.2f}" in (
        capsys.readouterr().out
    )
    with pytest.raises(Exception, match="--checkpoint is for a run's folder"):
        hubrl.evaluate.command.main([*arguments, "--checkpoint", "last"], standalone_mode=False)
    with pytest.raises(Exception, match=r"none\.zip is no file, but --env and --algo are for an"):
        hubrl.evaluate.command.main(["none.zip", "--env", env_id], standalone_mode=False)
    with pytest.raises(Exception, match="doesn't say where its agent plays: give --env"):
        hubrl.evaluate.command.main(arguments[:1], standalone_mode=False)


class OwnPolicy(ActorCriticCnnPolicy):
    pass


def test_what_does_not_fit(hub5: Path, tmp_path: Path) -> None:
    PPO(OwnPolicy, small_env()).save(tmp_path / "own.zip")
    with pytest.raises(ValueError, match=r"a policy that isn't known: .* --algo \(ppo, a2c"):
        algorithm_of(tmp_path / "own.zip")
    message = (
        r"own\.zip is an agent that observes \(4, 36, 36\), but hubrl train would give it "
        r"\(4, 84, 84\): evaluate it in a script"
    )
    TRPO("CnnPolicy", small_env()).save(tmp_path / "trpo.zip")
    with pytest.raises(ValueError, match=r"an algorithm or a policy that isn't known"):
        algorithm_of(tmp_path / "trpo.zip")
    larger = make_vec_env("hubrl/TinyImage-v0", 1, image=ImageFormat(size=84))
    with pytest.raises(ValueError, match=message):
        rebuild(tmp_path / "own.zip", "ppo", larger)
    make_agent("ppo", hub5).save(tmp_path / "own.zip")
    with pytest.raises(ValueError, match="algo is 'pppo', allowed: ppo, a2c"):
        rebuild(tmp_path / "own.zip", "pppo", small_env())
    with pytest.raises(ValueError, match=r"own\.zip does not fit algo 'dqn' and this env: "):
        rebuild(tmp_path / "own.zip", "dqn", small_env())
    plain = PPO("CnnPolicy", small_env())
    plain.save(tmp_path / "plain.zip")
    assert hub_of(tmp_path / "plain.zip") == "none"
    (tmp_path / "no.zip").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="is no agent saved by Stable-Baselines3"):
        hub_of(tmp_path / "no.zip")


class Evil:
    """Unpickling it makes the file ``canary``."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


def torch_file(value: Any, *, is_zip: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=is_zip)
    return buffer.getvalue()


def evil_zips(folder: Path, entries: dict[str, bytes]) -> Iterator[tuple[Path, bool]]:
    """The known ways to have a zip of SB3 run code or write files, and whether tensors are left."""
    data = json.loads(entries["data"])
    serialized = {
        ":type:": "<class 'dict'>",
        ":serialized:": b64encode(pickle.dumps(Evil())).decode(),
    }
    for key in ("policy_kwargs", "policy_class", "observation_space", "lr_schedule", "new"):
        text = json.dumps({**data, key: serialized | {"net_arch": [4]}})
        yield rezipped(folder, entries | {"data": text.encode()}), True
    for content in (
        pickle.dumps(Evil()),
        torch_file(Evil()),
        torch_file({"a": Evil()}),
        torch_file({"a": Evil()}, is_zip=False),
    ):
        yield rezipped(folder, entries | {"policy.pth": content}), False
        yield rezipped(folder, entries | {"pytorch_variables.pth": content}), True
        yield rezipped(folder, entries | {"policy.optimizer.pth": content}), True
    slips = {"../canary": b"x", "/tmp/../canary": b"x", "..\\canary": b"x", "a/../../canary": b"x"}
    yield rezipped(folder, entries | slips), True
    link = zipfile.ZipInfo("policy.pth")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    yield rezipped(folder, entries | {link: b"/etc/passwd"}), False
    yield rezipped(folder, entries, ("policy.pth", torch_file(Evil()))), False
    yield rezipped(folder, entries, ("policy.pth", entries["policy.pth"])), True


def rezipped(folder: Path, entries: Mapping[Any, bytes], *doubled: tuple[str, bytes]) -> Path:
    file = folder / "evil.zip"
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
        warnings.simplefilter("ignore")  # of doubled names
        names = {getattr(name, "filename", name): name for name in entries}
        for name in names.values():
            archive.writestr(name, entries[name])
        for name, content in doubled:
            archive.writestr(name, content)
    return file


def test_what_would_run_code_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "a" / "b" / "inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    PPO("CnnPolicy", small_env(), policy_kwargs={"net_arch": [4]}).save("plain.zip")
    with zipfile.ZipFile("plain.zip") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    expected = policy_tensors(Path("plain.zip"))
    n_refused = 0
    for file, has_tensors in evil_zips(inside, entries):
        if has_tensors:
            found = rebuild(file, "ppo", small_env()).policy.state_dict()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        else:
            with pytest.raises(ValueError, match=r"evil\.zip"):
                rebuild(file, "ppo", small_env())
            n_refused += 1
        for command in (["hubs", "add", "hub", "--license", "MIT", "--from-sb3", str(file)],):
            with pytest.raises(SystemExit) as end:
                cli.run(group, "hubrl", command)
            assert end.value.code == (0 if has_tensors else 2)
            shutil.rmtree("hub", ignore_errors=True)
    assert n_refused == 6
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"plain.zip", "evil.zip"}


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the zip of an agent with a hub holds."""
    folder = tmp_path_factory.mktemp("saved")
    hub = write_hub(folder / "hub", [nature_spec(name) for name in "abcde"])
    make_agent("ppo", hub).save(folder / "own.zip")
    with zipfile.ZipFile(folder / "own.zip") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"net_arch": [10**9]},
            r"net_arch is \[1000000000\], allowed: 1 to 8192, of at most",
        ),
        ({"net_arch": [8] * 9}, "net_arch is .* of at most 8 layers"),
        ({"net_arch": {"pi": 8}}, "net_arch is .* of at most 8 layers"),
        ({"net_arch": "x"}, "net_arch is 'x', allowed: list"),
        ({"n_quantiles": 10**12}, "n_quantiles is 1000000000000, allowed: 1 to 8192"),
        ({"n_critics": True}, "n_critics is True, allowed: int"),
        ({"use_expln": True}, "has the argument 'use_expln', allowed: net_arch, share_fea"),
        (
            {"activation_fn": "<class 'x.Y'>"},
            "activation_fn is \"<class 'x.Y'>\", allowed of torch.n",
        ),
        ({"activation_fn": []}, r"activation_fn is \[\], allowed of torch.nn: Tanh, ReLU, ELU"),
        ({"features_extractor_kwargs": {"features_dim": 10**9}}, "features_dim is 1000000000, all"),
        ({"features_extractor_kwargs": {"hub": 5}}, "hub is 5, allowed: str"),
        ({"features_extractor_kwargs": {"x": 5}}, "has the argument 'x', allowed: hub, top_k"),
    ],
)
def test_foreign_arguments(
    kwargs: dict[str, Any], message: str, saved_once: dict[str, bytes], tmp_path: Path
) -> None:
    entries = saved_once
    data = json.loads(entries["data"])
    data["policy_kwargs"] |= kwargs
    file = rezipped(tmp_path, entries | {"data": json.dumps(data).encode()})
    with pytest.raises(ValueError, match=message):
        rebuild(file, "ppo", small_env())
