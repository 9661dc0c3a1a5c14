"""``hubrl pretrain``: resuming, the hub that it writes, what it refuses, and that it learns."""

import contextlib
import copy
import csv
import dataclasses
import json
import math
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from small_hubs import nature_spec, write_hub
from small_runs import small_config, write_small_config

from agents.config import dump_config
from hubrl import cli, hub_folder, load_hub, pretrain, train
from hubrl.architectures import NatureConv
from hubrl.encoders import build_encoder
from hubrl.pretrain import Settings, command
from hubrl.pretraining import trainer
from hubrl.pretraining.frames import Places
from hubrl.pretraining.member import Member
from hubrl.pretraining.pretext import PRETEXTS
from hubrl.pretraining.trainer import Budget, Trainer
from hubrl.run_folder import held, read_rows
from hubrl.specs import save_hub

GAMES = ("ALE/Pong-v5", "ALE/Qbert-v5")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Small batches and little play, on one thread."""
    monkeypatch.setattr(trainer, "BATCH", 16)
    monkeypatch.setattr(trainer, "FIRST_STEPS", 48)
    monkeypatch.setattr(pretrain, "N_ENVS", 2)
    monkeypatch.setattr(pretrain, "MEMORY", 40_000_000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_trainer(
    objective: str, games: tuple[str, ...] = GAMES, seed: int = 0, n_frames: int = 1000
) -> Trainer:
    settings = Settings(envs=games, objective=objective, n_frames=n_frames, seed=seed)
    players = pretrain._make_players(settings)
    return Trainer(objective, players, Budget(settings.n_frames), seed=seed)


def run(*args: str, code: int = 0) -> str:
    """The command's output; it has to end with this code."""
    result = CliRunner().invoke(command, args, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize(
    "objective",
    [pytest.param(o, marks=[] if o == "contrast" else pytest.mark.slow) for o in PRETEXTS],
)
def test_a_resumed_run_has_the_same_weights_as_one_in_one_go(objective, tmp_path):
    games = GAMES if objective == "contrast" else GAMES[1:]
    straight, first, second = (make_trainer(objective, games) for _ in range(3))
    for _ in range(4):
        straight.update()
    for _ in range(2):
        first.update()
    first.save(tmp_path / "state.safetensors")
    second.load(tmp_path / "state.safetensors")
    for _ in range(2):
        second.update()
    assert second.progress.update == 4
    expected = straight.pretext.state_dict()
    for key, tensor in second.pretext.state_dict().items():
        assert tensor.equal(expected[key]), key


@pytest.mark.parametrize("objective", PRETEXTS)
def test_every_parameter_learns(objective):
    training = make_trainer(objective)
    # The decoder of the reconstruction begins at zero, so others learn from the second update on.
    training.update()
    training.update()
    for name, parameter in training.pretext.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_the_encoder_is_as_loud_as_a_random_one_and_says_the_same():
    training = make_trainer("inverse")
    training.update()
    with torch.no_grad():
        training.pretext.encoder.cnn[2].weight *= 3.0
    calibrated = copy.deepcopy(training.pretext)
    calibrated.encoder.load_state_dict(training.encoder())
    images = training._sample(np.random.default_rng((0, 1))).images
    first = float(training.pretext.first_loudness)
    assert float(calibrated.loudness(images)) == pytest.approx(first, rel=0.02)
    pixels = images.float() / 255
    before, after = training.pretext.encoder(pixels), calibrated.encoder(pixels)
    torch.testing.assert_close(after, after.norm() / before.norm() * before, rtol=1e-3, atol=1e-4)


def test_another_seed_gives_other_weights():
    one, other = (make_trainer("inverse", GAMES[1:], seed) for seed in (0, 1))
    assert not one.pretext.encoder.cnn[0].weight.equal(other.pretext.encoder.cnn[0].weight)


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    make_trainer("inverse", GAMES[1:]).update()
    assert torch.rand(1).equal(expected)


def test_the_rate_falls_to_zero_at_the_end(monkeypatch):
    """As the square root of what is left; the first updates, which warm up, are left out."""
    monkeypatch.setattr(trainer, "WARM_UP", 1)
    training = make_trainer("inverse", GAMES[1:], n_frames=224)
    rates = []
    while training.share_done < 1:
        training.update()
        rates.append(training._optimizer.param_groups[0]["lr"] / trainer.LEARNING_RATE)
    # 96 frames come first, and 32 with each update.
    assert rates == pytest.approx([(1 - played / 224) ** 0.5 for played in (96, 128, 160, 192)])


def test_the_command_writes_a_hub_that_loads(tmp_path):
    out = tmp_path / "mine"
    arguments = ("--env", GAMES[0], "--objective", "inverse", "--out", str(out), "-n", "160")
    run(*arguments)
    hub = load_hub(out)
    assert hub.name == "mine"
    assert hub.encoder_names == ("pong",)
    encoder = build_encoder(hub, hub.encoders[0])
    assert encoder(torch.zeros(2, 4, 84, 84, dtype=torch.uint8)).shape == (2, 3136)
    tensors = load_file(out / "pong.safetensors")
    assert sorted(tensors) == [f"cnn.{i}.{kind}" for i in (0, 2, 4) for kind in ("bias", "weight")]
    assert encoder.trunk.cnn[0].weight.equal(tensors["cnn.0.weight"])
    facts = hub.encoders[0].pretraining
    assert facts["games"] == [GAMES[0]]
    assert (facts["objective"], facts["frames"], facts["updates"]) == ("inverse", 160, 2)
    assert set(facts["losses"]) == {"inverse", "accuracy"}
    with (out / ".pretrain" / "pong" / "losses.csv").open() as file:
        assert [row["update"] for row in csv.DictReader(file)] == ["2"]
    assert list((out / ".pretrain" / "pong").glob("events.*"))
    assert (out / ".pretrain" / "pong" / "losses.png").is_file()
    rights = [(out / name).stat().st_mode for name in ("pong.safetensors", "hub.yaml")]
    assert rights[0] == rights[1]
    assert {file.name for file in out.iterdir()} == {".pretrain", "hub.yaml", "pong.safetensors"}
    assert "complete" not in run(*arguments, "--name", "another")
    assert load_hub(out).encoder_names == ("pong", "another")
    assert "already" in run(*arguments)


def test_an_unfinished_run_goes_on(tmp_path, monkeypatch):
    arguments = ("--env", GAMES[0], "--objective", "inverse", "--out", str(tmp_path / "hub"))
    arguments = (*arguments, "-n", "224")
    update, seen = Trainer.update, []

    def stop_after_two(training):
        seen.append(training.progress.update)
        if len(seen) == 3:
            raise RuntimeError("power cut")
        return update(training)

    monkeypatch.setattr(Trainer, "update", stop_after_two)
    monkeypatch.setattr(pretrain, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(pretrain, "LINE_SECONDS", 0.0)
    with pytest.raises(RuntimeError, match="power cut"):
        run(*arguments)
    assert not (tmp_path / "hub" / "hub.yaml").exists()
    assert (tmp_path / "hub" / ".pretrain" / "pong" / "losses.png").is_file()
    run(*arguments)
    assert seen == [0, 1, 2, 2, 3]
    assert load_hub(tmp_path / "hub").encoders[0].pretraining["updates"] == 4


def test_the_card_has_the_losses_of_a_run_that_was_killed_at_its_end(tmp_path, monkeypatch):
    arguments = ("--env", GAMES[0], "--objective", "inverse", "--out", str(tmp_path / "hub"))
    arguments = (*arguments, "-n", "224")

    def kill(*_):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "_add_self_supervised", kill)
        with pytest.raises(RuntimeError, match="power cut"):
            run(*arguments)
    run(*arguments)
    losses = load_hub(tmp_path / "hub").encoders[0].pretraining["losses"]
    (row,) = read_rows(tmp_path / "hub" / ".pretrain" / "pong" / "losses.csv")[-1:]
    assert losses == {"inverse": float(row["inverse"]), "accuracy": float(row["accuracy"])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"envs": ("ALE/Breakut-v5",)}, r"env 'ALE/Breakut-v5' .*closest: ALE/Breakout-v5"),
        ({"envs": ("CarRacing-v3",)}, r"env 'CarRacing-v3' is not an Atari game"),
        ({"envs": (GAMES[0], GAMES[0])}, "env 'ALE/Pong-v5' is given twice"),
        ({"objective": "contrats"}, r"objective 'contrats' .*closest: 'contrast'.*allowed: .*ppo"),
        ({"n_frames": 10}, "n-frames is 10, allowed: at least"),
        ({"minutes": 0.0}, "minutes is 0.0, allowed: above 0"),
        ({"minutes": math.nan}, "minutes is nan, allowed: above 0"),
        ({"seed": -1}, "seed is -1, allowed: 0 or more, below 4294967296"),
        ({"seed": 2**32}, "seed is 4294967296, allowed: 0 or more, below"),
        ({"objective": "ppo", "envs": GAMES}, "env is given 2 times, but objective ppo takes 1"),
        ({"objective": "ppo", "minutes": 1.0}, "minutes is 1.0, but objective ppo takes --n-fram"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"envs": (GAMES[0],), "objective": "contrast", **changes})


def make_member(out: Path, name: str = "pong", seed: int = 0) -> Member:
    settings = Settings(envs=(GAMES[0],), objective="contrast", n_frames=9999, seed=seed)
    return Member(out, pretrain._card(name, settings), dataclasses.asdict(settings))


def test_an_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out .*file is a file, allowed: a folder"):
        make_member(tmp_path / "file")
    with pytest.raises(ValueError, match=r"out .*inside can't be written to"):
        make_member(tmp_path / "file" / "inside")


def test_a_name_of_other_settings_is_refused(tmp_path):
    make_member(tmp_path).open()
    with pytest.raises(ValueError, match=r"seed is 1, but the encoder 'pong' .* begun with 0"):
        make_member(tmp_path, seed=1)


def test_a_name_that_the_hub_has_from_elsewhere_is_refused(tmp_path):
    member = make_member(tmp_path)
    member.add(NatureConv(4).state_dict(), {})
    with pytest.raises(ValueError, match=r"name 'pong' is taken .*--name"):
        make_member(tmp_path)


def test_a_hub_of_other_stacks_is_refused_before_training(tmp_path):
    two_frames = dataclasses.replace(nature_spec("two"), channels=2)
    write_hub(tmp_path / "hub", [two_frames])
    with pytest.raises(ValueError, match="'pong' takes 4 channels, but 'two' of the hub 2"):
        make_member(tmp_path / "hub")


def test_a_name_that_another_command_took_in_the_meantime_is_refused(tmp_path):
    first, second = make_member(tmp_path), make_member(tmp_path)
    first.add(NatureConv(4).state_dict(), {})
    weights = (tmp_path / "pong.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"name 'pong' was taken .* nothing was written; give ano"):
        second.add(NatureConv(4).state_dict(), {})
    assert (tmp_path / "pong.safetensors").read_bytes() == weights


def test_two_commands_that_finish_at_the_same_moment_lose_no_card(tmp_path, monkeypatch):
    make_member(tmp_path, "first").add(NatureConv(4).state_dict(), {})
    both_have_read = threading.Barrier(2)

    def save_late(hub, folder):
        with contextlib.suppress(threading.BrokenBarrierError):  # with the lock, one waits alone
            both_have_read.wait(timeout=0.5)
        save_hub(hub, folder)

    monkeypatch.setattr(hub_folder, "save_hub", save_late)
    members = [make_member(tmp_path, name) for name in ("left", "right")]
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(m.add, NatureConv(4).state_dict(), {}) for m in members]:
            assert done.result().is_file()
    assert set(load_hub(tmp_path).encoder_names) == {"first", "left", "right"}


def test_two_commands_that_train_the_same_encoder(tmp_path):
    arguments = ("--env", GAMES[0], "--objective", "inverse", "--out", str(tmp_path), "-n", "160")
    work = tmp_path / ".pretrain" / "pong"
    work.mkdir(parents=True)
    with held(work):
        assert "pong is in use by another process: wait for its end" in run(*arguments, code=2)
    assert not (tmp_path / "hub.yaml").exists()
    run(*arguments)
    assert load_hub(tmp_path).encoder_names == ("pong",)


def test_a_wrong_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="encoder name 'Pong!' must be lower case"):
        make_member(tmp_path, "Pong!")


def test_a_damaged_state_is_refused(tmp_path):
    (tmp_path / "state.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"state.safetensors is damaged .*remove its folder"):
        make_trainer("inverse").load(tmp_path / "state.safetensors")


def test_mistakes_exit_2_with_one_line_and_write_nothing(tmp_path, capsys):
    arguments = ["--env", "ALE/Pogn-v5", "--objective", "contrast", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        cli.run(command, "hubrl pretrain", arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "ALE/Pogn-v5" in error
    assert "ALE/Pong-v5" in error
    assert not list(tmp_path.iterdir())


def test_an_unknown_device_is_refused_before_anything_is_written(tmp_path):
    arguments = ["--env", "ALE/Pong-v5", "--objective", "ppo", "--out", str(tmp_path / "out")]
    with pytest.raises(click.UsageError, match="device is 'gpu', allowed on this machine: auto, c"):
        pretrain.command.main([*arguments, "--device", "gpu"], standalone_mode=False)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_there_are_no_pictures_but_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    log = pretrain.Log(tmp_path, make_trainer("inverse"), "inverse on Pong")
    log.add({"inverse": 1.0})
    log.close()
    line = "no picture will be drawn: figures need matplotlib: pip install 'hubrl[plot]'"
    assert capsys.readouterr().out.count(line) == 1
    assert (tmp_path / "losses.csv").is_file()
    assert not (tmp_path / "losses.png").exists()


def test_a_picture_is_titled_by_objective_and_games():
    settings = Settings(envs=GAMES, objective="contrast")
    assert pretrain._title(settings) == "contrast on Pong, Qbert"


def test_the_mean_score_and_its_interval():
    score = pretrain._score([0.0, 10.0] * 50)
    low, high = score["interval95"]
    assert score["mean"] == 5.0
    # The standard error is 5 / sqrt(100) = 0.5, and 1.96 of it 0.98.
    assert (low, high) == pytest.approx((4.02, 5.98), abs=0.15)


def test_the_settings_are_kept_beside_the_state(tmp_path):
    make_member(tmp_path).open()
    kept = json.loads((tmp_path / ".pretrain" / "pong" / "settings.json").read_text())
    assert kept["envs"] == [GAMES[0]]
    assert kept["n_frames"] == 9999


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory) -> Path:
    """Run folder of an agent without a hub that has hardly learned."""
    folder = tmp_path_factory.mktemp("breakout")
    overrides = {"env__id": "ALE/Breakout-v5", "train__n_timesteps": 32, "train__seed": 3}
    config = write_small_config(folder / "agent.yaml", **overrides)
    arguments = ["--config", str(config), "--run-dir", str(folder / "run")]
    assert train.command.main(arguments, standalone_mode=False) == 0
    return folder / "run"


@pytest.fixture
def breakout_run(trained_once, tmp_path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(trained_once, tmp_path / "run")


def test_the_encoder_of_an_agent_becomes_a_member(breakout_run, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "N_EPISODES", 2)
    rows = "time/total_timesteps,rollout/ep_rew_mean\n16,\n32,1.5\n"
    (breakout_run / "progress.csv").write_text(rows)
    arguments = ("--env", "ALE/Breakout-v5", "--objective", "ppo", "--play", str(breakout_run))
    run(*arguments, "--out", str(tmp_path / "hub"))
    hub = load_hub(tmp_path / "hub")
    encoder = build_encoder(hub, hub.only("breakout").encoders[0])
    agent = load_file(breakout_run / "checkpoints" / "last" / "policy.safetensors")
    assert encoder.trunk.cnn[0].weight.equal(agent["features_extractor.cnn.0.weight"])
    tensors = load_file(tmp_path / "hub" / "breakout.safetensors")
    kept, expected = tensors["linear.0.weight"], agent["features_extractor.linear.0.weight"]
    torch.testing.assert_close(kept.float(), expected, rtol=1e-3, atol=1e-7)
    facts = hub.encoders[0].pretraining
    assert facts["frames"] == 32
    assert facts["seed"] == 3, "the agent's"
    assert (tmp_path / "hub" / ".pretrain" / "breakout" / "returns.png").is_file()
    assert not list(breakout_run.rglob("*.png"))
    for score in (facts["score"], facts["random_score"]):
        assert score["interval95"][0] <= score["mean"] <= score["interval95"][1]


@pytest.mark.parametrize("objective", ["inverse", pytest.param("contrast", marks=pytest.mark.slow)])
def test_an_agent_plays_for_another_objective(objective, breakout_run, tmp_path):
    arguments = ("--env", "ALE/Breakout-v5", "--objective", objective, "--play", str(breakout_run))
    run(*arguments, "--out", str(tmp_path / "hub"), "-n", "160")
    assert load_hub(tmp_path / "hub").encoders[0].pretraining["play"] == str(breakout_run)


def test_the_frames_are_those_of_the_agents_actions(breakout_run):
    play = {"envs": ("ALE/Breakout-v5",), "play": str(breakout_run)}
    settings = Settings(objective="contrast", **play)
    (player,) = pretrain._make_players(settings)
    player.play_until(20)
    # The first environment has no random actions; a stack needs four frames to be read back.
    places = Places(np.arange(3, 20), np.zeros(17, dtype=np.int64))
    model = pretrain._load_player(breakout_run, pretrain._player_config(settings))
    best = model.predict(player.frames.observations(places), deterministic=True)[0]
    assert player.frames.actions(places).tolist() == best.tolist()


def test_an_agent_that_sees_other_images_is_refused(hub5, tmp_path):
    folder = tmp_path / "run36"
    overrides = {"env__id": "ALE/Breakout-v5", "train__n_timesteps": 32, "hub__name": str(hub5)}
    config = write_small_config(tmp_path / "agent36.yaml", **overrides)
    arguments = ["--config", str(config), "--run-dir", str(folder)]
    assert train.command.main(arguments, standalone_mode=False) == 0
    arguments = ["--env", "ALE/Breakout-v5", "--objective", "contrast", "--play", str(folder)]
    result = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "hub")])
    assert result.exit_code == 2
    message = r"sees images of \(4, 36, 36\), but encoders are trained on \(4, 84, 84\); give a run"
    assert re.search(message, result.output)
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("option", [("-n", "4096"), ("--minutes", "1"), ("--seed", "1")])
def test_an_agent_that_is_taken_as_it_is_refuses_options(option, breakout_run, tmp_path):
    arguments = ["--env", "ALE/Breakout-v5", "--objective", "ppo", "--play", str(breakout_run)]
    result = CliRunner().invoke(command, [*arguments, *option, "--out", str(tmp_path / "hub")])
    assert result.exit_code == 2
    assert (
        "an agent that is taken as it is: leave out --n-frames, --minutes and --seed"
        in result.output
    )


def test_a_player_that_needs_more_than_images_is_refused(breakout_run):
    file = breakout_run / "config.yaml"
    file.write_text(dump_config(small_config("recurrent_ppo", {"env.id": "ALE/Breakout-v5"})))
    settings = Settings(envs=("ALE/Breakout-v5",), objective="contrast", play=str(breakout_run))
    with pytest.raises(ValueError, match=r"an agent of recurrent_ppo, whose actions follow from"):
        pretrain._policy(settings)


@pytest.mark.parametrize("objective", ["ppo", "inverse"])
def test_a_player_of_another_game_or_no_player_is_refused(objective, breakout_run, tmp_path):
    for play, message in (
        (str(breakout_run), r"an agent of ALE/Breakout-v5, but env is ALE/Pong-v5"),
        (str(tmp_path), "is not the folder of a run"),
    ):
        arguments = ["--env", GAMES[0], "--objective", objective, "--out", str(tmp_path / "hub")]
        result = CliRunner().invoke(command, [*arguments, "--play", play])
        assert result.exit_code == 2
        assert re.search(message, result.output)
    assert not (tmp_path / "hub").exists()


def test_the_encoder_of_an_agent_of_another_algorithm_is_refused():
    settings = Settings(envs=("ALE/Breakout-v5",), objective="ppo", play="run")
    with pytest.raises(ValueError, match=r"an agent of dqn, but objective ppo takes the encoder"):
        pretrain._check_taken(settings, small_config("dqn"))


def test_the_encoder_of_an_agent_with_a_hub_is_refused(hub_run, tmp_path):
    arguments = ["--env", "ALE/Breakout-v5", "--objective", "ppo", "--play", str(hub_run)]
    result = CliRunner().invoke(command, [*arguments, "--out", str(tmp_path / "hub")])
    assert result.exit_code == 2
    assert "only the encoder of one without a hub can be taken" in result.output


@pytest.fixture
def hub_run(breakout_run, hub5) -> Path:
    """The same run, but its configuration says that it has a hub."""
    file = breakout_run / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["hub"]["name"] = str(hub5)
    file.write_text(yaml.safe_dump(config))
    return breakout_run


@pytest.mark.slow
def test_an_agent_is_trained_and_its_encoder_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "N_EPISODES", 2)
    arguments = ("--env", "ALE/Breakout-v5", "--objective", "ppo", "-n", "1024")
    run(*arguments, "--out", str(tmp_path / "hub"))
    facts = load_hub(tmp_path / "hub").encoders[0].pretraining
    assert (facts["objective"], facts["frames"]) == ("ppo", 1024)
    assert (tmp_path / "hub" / ".pretrain" / "breakout" / "returns.png").is_file()


@pytest.mark.slow
def test_contrast_learns_to_tell_observations_apart(monkeypatch):
    logs = learn(monkeypatch, "ALE/SpaceInvaders-v5", "contrast", batch=64, n_updates=250)
    assert mean(logs[-20:], "image") < 0.8 * math.log(64)
    assert mean(logs[-20:], "place") < 0.8 * mean(logs[:20], "place")


@pytest.mark.slow
def test_inverse_dynamics_gets_better_than_chance(monkeypatch):
    logs = learn(monkeypatch, "ALE/Boxing-v5", "inverse", batch=128, n_updates=250)
    assert mean(logs[-50:], "accuracy") > 2 / 18


def learn(monkeypatch, env: str, objective: str, batch: int, n_updates: int) -> list[dict]:
    monkeypatch.setattr(trainer, "BATCH", batch)
    monkeypatch.setattr(trainer, "FIRST_STEPS", 512)
    monkeypatch.setattr(pretrain, "N_ENVS", 8)
    n_frames = 8 * trainer.FIRST_STEPS + n_updates * trainer.FRAMES_PER_UPDATE
    settings = Settings(envs=(env,), objective=objective, n_frames=n_frames)
    training = Trainer(objective, pretrain._make_players(settings), Budget(n_frames))
    return [training.update() for _ in range(n_updates)]


def mean(logs: list[dict], name: str) -> float:
    return sum(log[name] for log in logs) / len(logs)
