"""Each measurement of the bench command at its smallest: what it compares, not how fast it is."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import gymnasium
import pytest
import torch
from small_hubs import nature_spec, write_hub
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

import envs  # noqa: F401 (registers the tiny environments)
from hubrl.benches import child, networks, processes, training
from hubrl.benches.measuring import GOALS, Result
from hubrl.encoders import Casts
from hubrl.specs import load_hub

SMALL = {"env.n_envs": 1, "algorithm.n_steps": 8, "algorithm.batch_size": 8}


def check(results: list[Result], names: list[str]) -> None:
    assert [result.name for result in results] == names
    for result in results:
        assert result.ours > 0
        assert result.theirs > 0
        assert result.ratio == result.ours / result.theirs
        assert result.goal == GOALS[result.name]


def use_hub(folder: Path, overrides: training.Overrides) -> training.Overrides:
    """The same with a small hub, where there is one."""
    if overrides["hub.name"] == "none":
        return overrides
    return {**overrides, "hub.name": str(folder)}


def test_update() -> None:
    check([networks.update("dispatch.update", batch=4, rounds=1)], ["dispatch.update"])


def test_rollout() -> None:
    check([networks.rollout("dispatch.rollout", batch=4, rounds=1)], ["dispatch.rollout"])


def test_routing_is_even(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pathway, features = networks._routed("float32", "cpu")
    used: list[int] = []
    encode = pathway.encode

    def counted(i: int, images: Tensor, rows_R: Tensor, casts: Casts | None = None) -> Tensor:
        used.extend([i] * len(rows_R))
        return encode(i, images, rows_R, casts)

    monkeypatch.setattr(pathway, "encode", counted)
    with torch.no_grad():
        features(networks.random_images(100), None)
    assert len(used) == 200
    assert min(used.count(i) for i in range(5)) > 20


def test_generator() -> None:
    check(networks.measure_generator(batch=4, rounds=1), ["generator"])


def test_cache() -> None:
    check(networks.measure_cache(n_steps=2, n_envs=4, rounds=1), ["cache"])


def test_random_hub_has_weight_files(tmp_path: Path) -> None:
    hub = load_hub(networks.save_random_hub(tmp_path / "hub", 3))
    assert len(hub.encoders) == 3
    assert len({spec.sha256 for spec in hub.encoders}) == 3


def test_hub_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def save_small_hub(folder: Path, n_encoders: int) -> Path:
        return write_hub(folder, [nature_spec(f"encoder{i}") for i in range(n_encoders)])

    monkeypatch.setattr(training, "save_random_hub", save_small_hub)
    monkeypatch.setattr(training, "LARGE_HUB", 3)
    monkeypatch.setattr(training, "SMALL_HUB", 2)
    results = training.measure_hub_size(SMALL, rounds=1)
    check(results, ["hub_size", "hub_size.trained", "hub_size.optimizer"])
    _, trained, optimizer = results
    assert optimizer.ours < trained.ours, "the optimizer's share is a part of it"


def test_ppo(hub5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hubs = {name: use_hub(hub5, hub) for name, hub in training.PPO_HUBS.items()}
    monkeypatch.setattr(training, "PPO_HUBS", hubs)
    monkeypatch.setattr(training, "SCRIPT_HUB", str(hub5))
    results = training.measure_ppo(SMALL, rounds=1)
    check(results, ["ppo.trained", "ppo.frozen", "ppo.none", "ppo.script"])
    assert len({result.theirs for result in results}) == 1, "plain SB3 is measured once"


def test_dqn(hub5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hubs = {name: use_hub(hub5, hub) for name, hub in training.DQN_HUBS.items()}
    monkeypatch.setattr(training, "DQN_HUBS", hubs)
    monkeypatch.setattr(training, "SCRIPT_HUB", str(hub5))
    start = {"algorithm.learning_starts": 4, "algorithm.buffer_size": 64}
    monkeypatch.setattr(training, "DQN_START", start)
    check(training.measure_dqn(n_steps=8, rounds=1), ["dqn.trained", "dqn.frozen", "dqn.script"])


@pytest.mark.parametrize("algorithm", ["ppo", "qrdqn"])
def test_the_plain_agent_has_our_hyperparameters(algorithm: str) -> None:
    overrides = {"env.n_envs": 1, "algorithm.batch_size": 16, "hub.name": "none"}
    if algorithm == "qrdqn":
        overrides["algorithm.buffer_size"] = 64
    config = training._config(algorithm, overrides)
    with (
        training._our_agent(algorithm, overrides) as ours,
        training._plain_agent(config, DummyVecEnv) as plain,
    ):
        for name in set(type(config.algorithm).model_fields) - {"name"}:
            assert str(getattr(ours, name)) == str(getattr(plain, name)), name
        for name in ("lr", "betas", "eps", "weight_decay"):
            optimizers = [model.policy.optimizer for model in (ours, plain)]
            assert optimizers[0].defaults[name] == optimizers[1].defaults[name], name
        assert ours.observation_space.shape == plain.observation_space.shape
        shapes = [[p.shape for p in model.policy.parameters()] for model in (ours, plain)]
        assert shapes[0] == shapes[1]


def test_env(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "N_ENVS", 1)
    check(training.measure_env(n_steps=4, rounds=1), ["env", "env.cpu"])


def test_seconds_of_an_optimizer() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    seconds = training._watch(optimizer)
    for _ in range(2):
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert len(seconds) == 2
    assert 0 < min(seconds) <= max(seconds) < 60


def test_bytes_of_weights() -> None:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    assert child.weight_bytes(layer, optimizer) == 4 * 8
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    # Parameters, gradients, two moments; and a count of steps for weight and bias.
    assert child.weight_bytes(layer, optimizer) == 4 * (4 * 8 + 2)


@pytest.mark.skipif(not child.STATUS.exists(), reason="Linux alone tells a process's peak")
def test_peak_memory_is_that_of_this_process() -> None:
    assert 1e8 < child.peak_bytes() < 1e11


@pytest.mark.skipif(not child.STATUS.exists(), reason="Linux alone tells a process's peak")
def test_memory_is_told_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    env = gymnasium.make("hubrl/TinyImage-v0")
    with child.tell_memory():
        model = PPO("CnnPolicy", env, n_steps=8, batch_size=8).learn(8)
    assert model.num_timesteps == 8
    told = int(capsys.readouterr().out.splitlines()[-1])
    assert 0 < told < child.peak_bytes()


def test_the_first_step_ends_the_plain_script(monkeypatch: pytest.MonkeyPatch) -> None:
    given = json.loads(processes._plain(device="cpu"))
    given = {**given, "n_envs": 2}
    monkeypatch.setattr(sys, "argv", ["child.py", json.dumps(given)])
    monkeypatch.setattr(child.os, "_exit", lambda code: sys.exit(code))
    with pytest.raises(SystemExit, match="42"), child.stop_at_first_step():
        child.run_plain()


def test_a_process_returns_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "child.py"
    script.write_text("import sys; print('first'); print(sys.argv[3])")
    monkeypatch.setattr(child, "__file__", str(script))
    assert processes._run("memory", "plain", "7") == "7"
    with pytest.raises(RuntimeError, match=r"load plain exits 0: "):
        processes._run("load", "plain", "7")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "name"),
    [
        (lambda: processes.measure_load(rounds=1), "load"),
        (lambda: processes.measure_memory(n_steps=1024, rounds=1), "memory"),
    ],
)
def test_whole_processes(measure: Callable[[], list[Result]], name: str) -> None:
    check(measure(), [name])
