"""What goes wrong while ``hubrl train`` runs: one line with the remedy, and nothing is lost."""

from __future__ import annotations

import fcntl
import json
import re
import resource
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import register_env, renew_manifest, write_small_config
from stable_baselines3.common.base_class import BaseAlgorithm

from agents import faults
from agents.config import RunConfig
from agents.runs import open_run
from envs import episode_seed
from envs.tiny import TinyImage
from hubrl import cli, evaluate, export, hubs, train
from hubrl.files import read_json


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*args: object) -> object:
    with pytest.raises(SystemExit) as exit:
        cli.run(train.command, "hubrl train", [str(arg) for arg in args])
    return exit.value.code


def last() -> dict[str, Any]:
    return read_json(Path("r/checkpoints/last/state.json"))


class Faulty(TinyImage):
    """Environment 1 of the tests does something wrong in its sixth episode."""

    n_resets = 0

    def fault(self, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        return answer

    def reset(self, **kwargs: Any) -> Any:
        self.n_resets += 1
        self.is_second = kwargs["seed"] == episode_seed(0, 1, self.n_resets - 1)
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        answer = super().step(action)
        is_due = self.is_second and self.n_resets == 6 and self._steps == 3
        return self.fault(answer) if is_due else answer


class Raising(Faulty):
    def fault(self, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        raise ZeroDivisionError("no physics\nhere")


class Hanging(Faulty):
    def fault(self, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        while True:  # not even a sleep, nor will it be stopped by its own handlers
            try:
                time.sleep(0.01)
            except Exception:
                continue


class OfAnotherShape(Faulty):
    def fault(self, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        return (answer[0][:, :30], *answer[1:])


class OfAnotherType(Faulty):
    def fault(self, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        return (answer[0].astype(np.float32), *answer[1:])


class WithoutReward(Faulty):
    def fault(self, answer: tuple[Any, ...]) -> tuple[Any, ...]:
        return (answer[0], float("nan"), *answer[2:])


FAULTS = [
    (Raising, "raised ZeroDivisionError: no physics here"),
    (Hanging, "did not answer within 0.5 s (env.timeout)"),
    (OfAnotherShape, "gave an observation of (36, 30, 3) uint8 instead of (36, 36, 3) uint8"),
    (OfAnotherType, "gave an observation of (36, 36, 3) float32 instead of (36, 36, 3) uint8"),
    (WithoutReward, "gave the reward nan"),
]


@pytest.mark.parametrize(
    ("algorithm", "kind", "fault"), [*(("ppo", *each) for each in FAULTS), ("dqn", *FAULTS[0])]
)
def test_an_environments_fault_can_be_repeated(
    algorithm: str,
    kind: type[Faulty],
    fault: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    register_env("Faulty-v0", kind)
    config = write_small_config(
        tmp_path / "c.yaml", algorithm, env__id="Faulty-v0", env__timeout=0.5
    )
    assert run("--config", config, "--run-dir", "r") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    seed = episode_seed(0, 1, 5)
    assert f"environment 1 {fault}, 3 actions after reset(seed={seed}), in its episode 5" in error
    assert "r/environment-fault.json has the actions" in error
    assert "--resume r goes on" in error
    assert last()["num_timesteps"] in (64, 80), "from the start of the last rollout"

    record = json.loads(Path("r/environment-fault.json").read_text())
    assert record["env"] == "Faulty-v0"
    env = gym.make("hubrl/TinyImage-v0")
    env.reset(seed=record["episode_seed"])
    assert [env.step(action)[2] for action in record["actions"]] == [False] * 3

    if kind is not Raising:  # what goes on doesn't depend on the fault
        return
    register_env("Faulty-v0", TinyImage)  # it was mended
    assert run("--resume", "r") == 0
    assert last()["num_timesteps"] >= 100


def spoil(times: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make the value function infinite in some update; gives the learning rates then."""
    rates: list[float] = []

    class Spoiler(train.ProgressCallback):
        def _on_rollout_end(self) -> None:
            if len(rates) < times and self.num_timesteps >= 64:
                rates.append(self.model.lr_schedule(1.0))
                self.model.policy.value_net.weight.data[0, 5] = float("inf")

    monkeypatch.setattr(train, "ProgressCallback", Spoiler)
    return rates


def test_a_loss_that_is_no_number_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_small_config(tmp_path / "c.yaml", train__save_freq=32, hub__precision="float32")
    with monkeypatch.context() as patch:
        spoil(1, patch)
        assert run("--config", config, "--run-dir", "r") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step 64: weight value_net.weight holds infinity; the update is left out" in error
    assert "a lower algorithm.learning_rate, or raise train.n_rollbacks" in error
    assert last()["num_timesteps"] == 32
    assert run("--resume", "r") == 0


def test_a_policy_whose_answer_is_no_number_is_rolled_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights are finite, but what they make of an observation isn't."""
    is_spoiled = iter([True, False])

    class Spoiler(train.EpisodesCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 70 and next(is_spoiled):
                self.model.policy.action_net.weight.data.fill_(3e38)
            return super()._on_step()

    monkeypatch.setattr(train, "EpisodesCallback", Spoiler)
    config = write_small_config(tmp_path / "c.yaml", train__save_freq=32, train__n_rollbacks=1)
    assert run("--config", config, "--run-dir", "r") == 0
    message = "step 70: the policy's answer is not finite: back to step 64 at half the learning"
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_no_best_checkpoint_of_weights_that_are_not_finite(
    algorithm: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """DQN takes the best of what are no numbers, and games end with a return all the same."""

    class Spoiler(train.EpisodesCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps == 64:
                next(self.model.policy.parameters()).data[0] = float("nan")

    monkeypatch.setattr(train, "EpisodesCallback", Spoiler)
    config = write_small_config(tmp_path / "c.yaml", algorithm, train__eval_freq=64)
    assert run("--config", config, "--run-dir", "r") == 1
    assert "holds NaN; no checkpoint is made of it" in capsys.readouterr().err
    assert not Path("r/checkpoints/best").exists()


def test_no_checkpoint_of_weights_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Spoiler(train.EpisodesCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps == 64:
                self.model.policy.action_net.bias.data[1] = float("nan")

    monkeypatch.setattr(train, "EpisodesCallback", Spoiler)
    config = write_small_config(tmp_path / "c.yaml", train__save_freq=32)
    assert run("--config", config, "--run-dir", "r") == 1
    message = "step 64: weight action_net.bias holds NaN; no checkpoint is made of it"
    assert message in capsys.readouterr().err
    assert last()["num_timesteps"] == 32


@pytest.mark.parametrize("save_freq", [0, 32])
def test_rolled_back_with_half_the_learning_rate(
    save_freq: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_small_config(
        tmp_path / "c.yaml", train__save_freq=save_freq, train__n_rollbacks=2
    )
    rates = spoil(2, monkeypatch)
    assert run("--config", config, "--run-dir", "r") == 0
    assert rates == [2.5e-4, 1.25e-4]
    back = "back to step 32 at half" if save_freq else "back to step 0 at half"
    assert capsys.readouterr().out.count(back) == 2
    assert (last()["n_rollbacks"], last()["num_timesteps"]) == (2, 128)
    model, n_rollbacks = train._restored(open_run(Path("r")), Path("r"))
    assert n_rollbacks == 2
    assert model.lr_schedule(1.0) == 2.5e-4 / 4, "also after a stop"


def test_a_rollback_frees_the_replay_buffer_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them may not fit into the memory."""
    buffers: list[weakref.ref[Any]] = []
    build = train._build

    def watched(config: RunConfig) -> BaseAlgorithm:
        assert not [buffer for buffer in buffers if buffer() is not None]
        model = build(config)
        buffers.append(weakref.ref(model.replay_buffer))  # type: ignore[attr-defined]
        return model

    class Spoiler(train.EpisodesCallback):
        def _on_rollout_start(self) -> None:
            if self.num_timesteps == 48 and len(buffers) == 1:
                next(self.model.policy.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(train, "_build", watched)
    monkeypatch.setattr(train, "EpisodesCallback", Spoiler)
    config = write_small_config(tmp_path / "c.yaml", "dqn", train__n_rollbacks=1)
    assert run("--config", config, "--run-dir", "r") == 0
    assert len(buffers) == 2


def test_not_more_often_than_wished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_small_config(tmp_path / "c.yaml", train__n_rollbacks=1)
    rates = spoil(5, monkeypatch)
    assert run("--config", config, "--run-dir", "r") == 1
    assert len(rates) == 2
    assert "value_net.weight holds infinity" in capsys.readouterr().err


def bad_rewards(model: BaseAlgorithm) -> None:
    model.rollout_buffer.rewards[0, 0] = float("nan")  # type: ignore[attr-defined]
    model.rollout_buffer.advantages[0, 0] = float("nan")  # type: ignore[attr-defined]


def bad_gradient(model: BaseAlgorithm) -> None:
    weight = model.policy.action_net.bias  # type: ignore[union-attr,attr-defined]
    weight.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize(
    ("break_it", "origin"),
    [
        (bad_rewards, "rewards of the rollout hold NaN"),
        # Clipping spreads it to all: the first of them stands for them.
        (bad_gradient, r"the gradient of features_extractor\S+ holds NaN"),
    ],
)
def test_the_first_bad_tensor_is_named(
    break_it: Callable[[BaseAlgorithm], None],
    origin: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Breaker(train.ProgressCallback):
        def _on_rollout_end(self) -> None:
            break_it(self.model)

    monkeypatch.setattr(train, "ProgressCallback", Breaker)
    config = write_small_config(tmp_path / "c.yaml")
    assert run("--config", config, "--run-dir", "r") == 1
    assert re.search(origin, capsys.readouterr().err)


def test_weights_that_are_no_numbers_are_said_in_one_line_by_commands_that_play(
    hub5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a stranger's checkpoint may hold them; its checksums are a stranger's, too."""
    config = write_small_config(tmp_path / "c.yaml", hub__name=str(hub5))
    assert run("--config", config, "--run-dir", "r") == 0
    file = Path("r/checkpoints/last/policy.safetensors")
    tensors = load_file(file)
    tensors["action_net.weight"].fill_(float("nan"))
    save_file(tensors, file)
    renew_manifest(file.parent)
    onnx, student = (["r", "--format", name] for name in ("onnx", "distilled"))
    for command, arguments in (
        (evaluate.command, ["r"]), (export.command, onnx), (export.command, student),
    ):  # fmt: skip
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.run(command, "hubrl", arguments)
        assert exit.value.code == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "weight action_net.weight holds NaN" in error


@pytest.mark.parametrize(("kind", "fault"), FAULTS[:1])
def test_a_fault_is_said_in_one_line_by_commands_that_play(
    kind: type[Faulty],
    fault: str,
    hub5: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    register_env("Faulty-v0", TinyImage)
    config = write_small_config(tmp_path / "c.yaml", env__id="Faulty-v0", hub__name=str(hub5))
    assert run("--config", config, "--run-dir", "r", "-n", 32) == 0
    register_env("Faulty-v0", kind)
    monkeypatch.setattr(Faulty, "reset", reset_of_any_seed)
    for command, args in (
        (hubs.command, ["rank", str(hub5), "--env", "Faulty-v0", "-n", "1024"]),
        (export.command, ["r", "--format", "onnx"]),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            cli.run(command, "hubrl", args)
        assert exit.value.code == 1
        error = capsys.readouterr().err
        assert fault in error
        assert error.count("\n") == 1


def reset_of_any_seed(self: Faulty, **kwargs: Any) -> Any:
    self.n_resets += 1
    self.is_second = True
    return TinyImage.reset(self, **kwargs)


def test_two_commands_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_small_config(tmp_path / "c.yaml")
    assert run("--config", config, "--run-dir", "r", "-n", 32) == 0
    with Path("r/.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run("--resume", "r") == 2
    assert "r is in use by another process: wait for its end, or" in capsys.readouterr().err
    assert run("--resume", "r") == 0


def limit_file_size() -> None:
    """As on a disk that is full, but for the kind of error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "file"),
    [("ppo", "checkpoint r/checkpoints/last"), ("dqn", r"r/checkpoints/replay/\.replay-0")],
)
def test_a_full_disk(algorithm: str, file: str, tmp_path: Path) -> None:
    """The process can't write large files, from its first checkpoint on."""
    config = write_small_config(tmp_path / "c.yaml", algorithm, train__save_freq=32)
    command = [sys.executable, "-m", "hubrl.train", "--config", config, "--run-dir", "r"]
    done = subprocess.run(
        command, preexec_fn=limit_file_size, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert re.search(f"{file}.* can't be written", done.stderr)
    assert run("--resume", "r") == 0


def test_a_table_that_cant_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    config = write_small_config(tmp_path / "c.yaml", train__save_freq=32)
    with monkeypatch.context() as patch:
        patch.setattr("csv.DictWriter.writerow", full)
        assert run("--config", config, "--run-dir", "r") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left on device" in error
    assert run("--resume", "r") == 0


def test_a_buffer_that_is_larger_than_the_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_small_config(tmp_path / "c.yaml", "dqn", algorithm__buffer_size=10**10)
    assert run("--config", config, "--run-dir", "r") == 2
    error = capsys.readouterr().err
    assert "algorithm.buffer_size 10,000,000,000 takes 564,480.0 GB, but " in error
    assert "GB are free: lower algorithm.buffer_size" in error
    assert not Path("r").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_no_memory_for_the_first_update(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr("stable_baselines3.PPO.train", fail)
    assert run("--config", write_small_config(tmp_path / "c.yaml"), "--run-dir", "r") == 1
    message = "out of memory: lower algorithm.n_steps (16) or algorithm.batch_size (16) or"
    assert message in capsys.readouterr().err


def test_without_a_file_of_free_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(faults, "MEMORY_FILE", tmp_path / "missing")
    assert faults._free_bytes() == float("inf")
