"""The command ``hubrl hubs``: what it prints, its exit codes, and encoders that fail a check."""

import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_hubs import Outcome, add_golden, call_hubs, nature_spec, write_hub
from torch import Tensor, nn

from hubrl.architectures import ARCHITECTURES, Architecture
from hubrl.fetching.recipes import PROVIDERS
from hubrl.files import file_sha256
from hubrl.specs import BUILT_IN_HUBS, HubSpec, load_hub, save_hub

CHECKS = [
    "weights",
    "tensors",
    "features_dim",
    "license",
    "finite",
    "golden",
    "alive",
    "shift",
    "order",
]


Hubs = Callable[..., Outcome]


@pytest.fixture
def hubs() -> Hubs:
    """The command as a user calls it, to its exit."""
    return call_hubs


def change_card(folder: Path, encoder: str, **changes: Any) -> None:
    """Change keys of an encoder's card."""
    data = yaml.safe_load((folder / "hub.yaml").read_text())
    card = next(card for card in data["encoders"] if card["name"] == encoder)
    card.update(changes)
    (folder / "hub.yaml").write_text(yaml.safe_dump(data))


def change_weights(
    folder: Path, encoder: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    """Write other tensors and their sha256."""
    file = folder / f"{encoder}.safetensors"
    save_file(change(load_file(file)), file)
    change_card(folder, encoder, sha256=file_sha256(file))


@pytest.fixture(scope="module")
def pristine_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``hub`` copies."""
    folder = tmp_path_factory.mktemp("pristine") / "pair"
    write_hub(folder, [nature_spec("left"), nature_spec("right")])
    add_golden(folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path, pristine_hub: Path) -> Path:
    """Folder of a hub of two encoders with golden features."""
    return Path(shutil.copytree(pristine_hub, tmp_path / "pair"))


@pytest.fixture
def built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder instead of that of the hubs that ship with hubrl."""
    folder = tmp_path / "built_in"
    folder.mkdir()
    monkeypatch.setattr("hubrl.specs.BUILT_IN_HUBS", folder)
    monkeypatch.setattr("hubrl.hubs.BUILT_IN_HUBS", folder)
    return folder


def describe(folder: Path, description: str) -> None:
    save_hub(dataclasses.replace(load_hub(folder), description=description), folder)


def test_list_has_a_line_for_each_hub(hubs: Hubs, built_in: Path, hub: Path) -> None:
    describe(hub, "Two encoders\nof random numbers. They are for tests.")
    shutil.move(hub, built_in / "pair")
    write_hub(built_in / "one", [nature_spec("x", 44, "nature_cnn")])
    n_bytes = sum(file.stat().st_size for file in (built_in / "pair").glob("*.safetensors"))
    outcome = hubs("list")
    one, pair = outcome.out.splitlines()
    assert outcome.code == 0
    assert one.split("  ")[0].strip() == "one"
    assert one.endswith("4 channels of 44x44 px")
    assert pair == (
        f"pair  2 encoders  {n_bytes / 1e6:.2f} MB  4 channels of 36x36 px"
        "  Two encoders of random numbers."
    )


def test_fetch_list_and_show_of_a_hub_that_ships_as_cards(
    hubs: Hubs, built_in: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HUBRL_CACHE", str(tmp_path / "cache"))
    file = hub / "left.safetensors"
    monkeypatch.setitem(PROVIDERS, "file", lambda address, spec: load_file(file))
    (built_in / "one").mkdir()
    card = dataclasses.replace(nature_spec("left"), provider="file:left#sha256=0")
    save_hub(HubSpec(name="one", encoders=(card,)), built_in / "one")
    for words, code in ((["check", "one"], 2), (["push", "one", "./x"], 2)):
        outcome = hubs(*words)
        assert outcome.code == code
        assert "hub 'one' is not on this machine" in outcome.err
    assert hubs("list").out.split()[:4] == ["one", "1", "encoder", "not"]
    shown = hubs("show", "one").out
    assert "hub one, 1 encoder, not fetched, 4 channels of 36x36 px" in shown
    assert "`python -m hubrl.hubs fetch one` gets the weights" in shown
    assert re.search(r"license +MIT\n.*\n +provider +file:left#sha256=0\n +weights +not f", shown)
    fetched = hubs("fetch", "one")
    assert fetched.code == 0
    assert fetched.out.splitlines()[0] == "left (MIT) from file:left"
    assert fetched.out.splitlines()[1].startswith(f"{tmp_path}/cache/hubs/one: one, 1 encoder, 0.")
    assert hubs("fetch", "one").out.splitlines() == fetched.out.splitlines()[1:]
    assert hubs("check", "one").code == 0
    assert "not fetched" not in hubs("list").out + hubs("show", "one").out
    outcome = hubs("fetch", "two")
    assert outcome.code == 2
    assert "error: hub 'two' is unknown" in outcome.err


def test_list_in_a_terminal_keeps_to_one_row(
    hubs: Hubs, built_in: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(hub, "Far too long " * 20)
    shutil.move(hub, built_in / "pair")
    monkeypatch.setattr("hubrl.hubs._terminal_width", lambda: 80)
    (line,) = hubs("list").out.splitlines()
    assert len(line) == 80
    assert line.endswith("...")


def test_list_without_hubs_says_where_it_looked(hubs: Hubs, built_in: Path) -> None:
    assert hubs("list") == (0, f"no hubs in {built_in}\n", "")


def test_list_says_that_weights_are_missing(hubs: Hubs, built_in: Path, hub: Path) -> None:
    (hub / "left.safetensors").unlink()
    shutil.move(hub, built_in / "pair")
    assert "pair  2 encoders  weights missing  4 channels" in hubs("list").out


def test_list_with_a_wrong_card(hubs: Hubs, built_in: Path, hub: Path) -> None:
    change_card(hub, "left", std=[0.0])
    shutil.move(hub, built_in / "pair")
    outcome = hubs("list")
    assert outcome.code == 2
    assert outcome.err == "hubrl hubs: error: encoder 'left': std is (0.0,), allowed: above 0\n"


def test_show_prints_the_whole_card(hubs: Hubs, hub: Path) -> None:
    describe(hub, "Two encoders of random numbers. They are for tests.")
    pretraining = {
        "games": ["ALE/Pong-v5", "ALE/Qbert-v5"],
        "frames": 1_000_000,
        "score": {"mean": 12.5, "interval95": [10.0, 15.25]},
        "losses": {"image": 0.5, "place": 0.25},
        "resumed": False,
        "command": "hubrl pretrain " + "--env ALE/Pong-v5 " * 10,
    }
    change_card(hub, "left", pretraining=pretraining)
    outcome = hubs("show", hub)
    lines = outcome.out.splitlines()
    card = load_hub(hub).encoders[0]
    size = (hub / "left.safetensors").stat().st_size / 1e6
    assert outcome.code == 0
    assert lines[0] == f"hub pair, 2 encoders, {2 * size:.2f} MB, 4 channels of 36x36 px"
    assert lines[1] == str(hub)
    assert "Two encoders of random numbers. They are for tests." in lines
    for label, text in {
        "architecture": "nature_conv",
        "features_dim": "64",
        "input": "4 channels of 36x36 px",
        "frames": "stack (all of a stack)",
        "mean": "0.0",
        "std": "1.0",
        "license": "MIT",
        "source": "random numbers",
        "weights": f"left.safetensors, {size:.2f} MB",
        "sha256": f"{card.sha256[:12]}...",
        "golden": ", ".join(map(str, card.golden)),
        "  games": "ALE/Pong-v5, ALE/Qbert-v5",
        "  frames": "1,000,000",
        "  score": "12.5 (95% interval 10.0 to 15.25)",
        "  losses": "image 0.5, place 0.25",
        "  resumed": "False",
        "  command": pretraining["command"].strip(),
    }.items():
        assert f"  {label:<16} {text}" in lines
    assert lines.index("left") < lines.index("  pretraining") < lines.index("right")


@pytest.mark.parametrize("interval", [[0.5], 5, None, [1, 2, 3], {"low": 1}])
def test_show_takes_facts_of_any_form(hubs: Hubs, hub: Path, interval: object) -> None:
    change_card(hub, "left", pretraining={"score": {"mean": 1.0, "interval95": interval}})
    shown = hubs("show", hub)
    assert shown.code == 0
    assert "mean 1.0" in shown.out
    assert "95%" not in shown.out


def test_show_says_that_the_license_is_empty(hubs: Hubs, hub: Path) -> None:
    change_card(hub, "left", license=None)
    assert "\n  license          none, must be stated\n" in hubs("show", hub).out


def test_show_says_which_encoders_are_always_active(hubs: Hubs, hub: Path) -> None:
    assert "always active" not in hubs("show", hub).out
    save_hub(dataclasses.replace(load_hub(hub), always_active=("right",)), hub)
    assert "\nalways active, where top_k leaves one to choose: right\n" in hubs("show", hub).out


@pytest.mark.parametrize("width", [80, 100])
def test_show_fits_the_terminal(
    hubs: Hubs, hub: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    describe(hub, "A long description. " * 20)
    change_card(hub, "left", pretraining={"command": "hubrl pretrain " + "--env x " * 40})
    monkeypatch.setattr("hubrl.hubs._terminal_width", lambda: width)
    lines = hubs("show", f"{hub}").out.splitlines()
    lines.remove(str(hub))
    assert width - 10 < max(map(len, lines)) <= width
    command_line = next(i for i, line in enumerate(lines) if line.startswith("    command"))
    assert lines[command_line + 1].startswith(" " * 19)


def test_show_takes_every_name_of_a_hub(hubs: Hubs, built_in: Path, hub: Path) -> None:
    by_file = hubs("show", hub / "hub.yaml")
    assert by_file == hubs("show", hub)
    shutil.copytree(hub, built_in / "pair")
    assert hubs("show", "pair").out.splitlines()[0] == by_file.out.splitlines()[0]
    one = hubs("show", "pair:right").out
    assert one.startswith("hub pair:right, 1 encoder, ")
    assert "left" not in one


def test_show_says_what_is_missing(hubs: Hubs, hub: Path) -> None:
    (hub / "left.safetensors").unlink()
    assert "  weights          left.safetensors, missing\n" in hubs("show", hub).out
    bare = dataclasses.replace(load_hub(hub), encoders=(nature_spec("bare"),))
    save_hub(bare, hub)
    out = hubs("show", hub).out
    assert "  weights          none\n" in out
    assert "  golden           none\n" in out
    assert "sha256" not in out


def test_check_of_a_sound_hub(hubs: Hubs, hub: Path) -> None:
    outcome = hubs("check", hub)
    *lines, last = outcome.out.splitlines()
    assert outcome.code == 0
    assert [line.split()[:3] for line in lines] == [
        ["ok", encoder, check] for encoder in ("left", "right") for check in CHECKS
    ]
    assert last == "hub pair: 18 checks, none failed"
    assert outcome.err == ""


def test_check_of_one_encoder_alone(hubs: Hubs, hub: Path) -> None:
    (hub / "left.safetensors").unlink()
    outcome = hubs("check", f"{hub}:right")
    assert outcome.code == 0
    assert "hub pair:right: 9 checks, none failed" in outcome.out


def test_check_of_different_encoders(hubs: Hubs, mixed_hub: Path) -> None:
    add_golden(mixed_hub)
    outcome = hubs("check", mixed_hub)
    assert outcome.failed == []
    assert outcome.code == 0


def test_check_ignores_rounding(hubs: Hubs, hub: Path) -> None:
    golden = load_hub(hub).encoders[0].golden
    change_card(hub, "left", golden=[number + 0.9e-3 * max(golden) for number in golden])
    assert hubs("check", hub).code == 0
    change_card(hub, "left", golden=[number + 1.1e-3 * max(golden) for number in golden])
    assert hubs("check", hub).failed == ["left golden"]


def test_dead_encoder(hubs: Hubs, hub: Path) -> None:
    change_weights(hub, "left", lambda tensors: {k: t.zero_() for k, t in tensors.items()})
    add_golden(hub)  # even where the card describes it truly
    outcome = hubs("check", hub)
    assert outcome.failed == ["left alive", "left shift", "left order"]
    assert outcome.code == 1
    assert "100.0% of the features are constant over 32 images, at most 75%" in outcome.out
    assert "hub pair: 18 checks, 3 failed" in outcome.out


def test_exchanged_encoders(hubs: Hubs, hub: Path) -> None:
    left, right = (load_file(hub / f"{name}.safetensors") for name in ("left", "right"))
    change_weights(hub, "left", lambda _: right)
    change_weights(hub, "right", lambda _: left)
    outcome = hubs("check", hub)
    assert outcome.failed == ["left golden", "right golden"]
    assert outcome.code == 1
    assert "other weights or preprocessing" in outcome.out


@pytest.mark.parametrize("changes", [{"mean": [0.4] * 3}, {"std": [0.21]}, {"frames": "stack"}])
def test_card_with_other_preprocessing(
    hubs: Hubs, mixed_hub: Path, changes: dict[str, Any]
) -> None:
    add_golden(mixed_hub)
    change_card(mixed_hub, "rgb", **changes)
    assert hubs("check", f"{mixed_hub}:rgb").failed == ["rgb golden"]


def test_encoder_that_gives_no_numbers(hubs: Hubs, hub: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["cnn.4.bias"][3] = torch.nan
        return tensors

    change_weights(hub, "left", spoil)
    outcome = hubs("check", hub)
    assert outcome.failed == ["left finite", "left golden", "left shift", "left order"]
    assert "32 of 2,048 features are NaN or infinite" in outcome.out


def test_encoder_that_adds_up_the_frames(hubs: Hubs, hub: Path) -> None:
    def same_for_all_frames(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        first = tensors["cnn.0.weight"]
        return tensors | {"cnn.0.weight": first[:, :1].expand_as(first).contiguous()}

    change_weights(hub, "left", same_for_all_frames)
    add_golden(hub)
    assert hubs("check", hub).failed == ["left order"]


class MeanTrunk(nn.Module):
    """Brightness alone: no shift of the image changes it."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.gain * images_BCHW.mean(dim=(2, 3))


def test_encoder_that_ignores_places(
    hubs: Hubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "mean", Architecture(lambda spec: MeanTrunk()))
    spec = dataclasses.replace(nature_spec("x"), architecture="mean", features_dim=4)
    folder = write_hub(tmp_path / "flat", [spec])
    add_golden(folder)
    assert "x shift" in hubs("check", folder).failed


def test_single_channel_has_no_order(hubs: Hubs, tmp_path: Path) -> None:
    spec = dataclasses.replace(nature_spec("x"), channels=1)
    folder = write_hub(tmp_path / "grey", [spec])
    add_golden(folder)
    outcome = hubs("check", folder)
    assert "hub grey: 8 checks, none failed" in outcome.out


@pytest.mark.parametrize("license", [" ", "NOASSERTION", None])
def test_license_must_be_stated(hubs: Hubs, hub: Path, license: str | None) -> None:
    change_card(hub, "left", license=license)
    outcome = hubs("check", hub)
    assert outcome.failed == ["left license"]
    assert f"{license!r}, must be stated" in outcome.out


def test_card_without_golden_features(hubs: Hubs, hub: Path) -> None:
    change_card(hub, "left", golden=None)
    outcome = hubs("check", hub)
    assert outcome.failed == ["left golden"]
    assert "not in the card; hubrl.encoders.golden_features gives it" in outcome.out


def test_card_without_weights(hubs: Hubs, hub: Path) -> None:
    change_card(hub, "left", weights=None, sha256=None)
    outcome = hubs("check", hub)
    assert outcome.failed == ["left weights", "left golden"]
    assert "the card names no file: nothing pretrained is loaded" in outcome.out


def test_unknown_hub(hubs: Hubs, built_in: Path, hub: Path) -> None:
    shutil.move(hub, built_in / "pair")
    for subcommand in ("show", "check"):
        outcome = hubs(subcommand, "pear")
        assert (outcome.code, outcome.out) == (2, "")
        assert "hub 'pear' is unknown (closest: 'pair'); hubs: pair" in outcome.err
        assert outcome.err.count("\n") == 1


def test_a_card_that_would_fill_the_memory(hubs: Hubs, hub: Path, tmp_path: Path) -> None:
    """Nine times nine times nine ... words by YAML aliases."""
    lines = ["  x0: &x0 [ha]"]
    lines += [f"  x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 30)]
    text = (hub / "hub.yaml").read_text()
    nested = "\n".join(f"  {line}" for line in ["pretraining:", *lines]) + "\n"
    (hub / "hub.yaml").write_text(text.replace("  pretraining: {}\n", nested, 1))
    for arguments in (("show", hub), ("check", hub), ("push", hub, tmp_path / "shared")):
        outcome = hubs(*arguments)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
        assert "has the YAML anchor or alias 'x0', allowed: none; write out at" in outcome.err
    assert len(outcome.err) < 300


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "left.safetensors is missing; put it there"),
        (lambda file: file.write_bytes(file.read_bytes()[:1000]), "the file is truncated or not"),
        (lambda file: shutil.copy(file.with_stem("right"), file), "has sha256 .*, its card says"),
    ],
)
def test_damaged_weight_file(
    hubs: Hubs, hub: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(hub / "left.safetensors")
    outcome = hubs("check", hub)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert re.search(rf"^hubrl hubs check: error: encoder 'left': .*{message}", line)
    # The other one is checked all the same.
    *lines, last = outcome.out.splitlines()
    assert [line.split()[:3] for line in lines] == [["ok", "right", check] for check in CHECKS]
    assert last == "hub pair: 9 checks, none failed; encoders that don't load: 1 of 2"


def test_every_damaged_file_has_its_line(hubs: Hubs, hub: Path) -> None:
    for file in hub.glob("*.safetensors"):
        file.unlink()
    outcome = hubs("check", hub)
    left, right = outcome.err.splitlines()
    assert outcome.code == 2
    assert outcome.out == "hub pair: 0 checks, none failed; encoders that don't load: 2 of 2\n"
    assert left.startswith("hubrl hubs check: error: encoder 'left': its weight file ")
    assert right.startswith("hubrl hubs check: error: encoder 'right': its weight file ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features_dim": 65}, "features_dim is 65 in its card, but the architecture gives (64,)"),
        ({"architecture": "nature_cnn"}, "does not fit architecture 'nature_cnn'"),
        ({"architecture": "nature"}, "architecture 'nature' is unknown"),
    ],
)
def test_card_that_does_not_fit_its_file(
    hubs: Hubs, hub: Path, changes: dict[str, Any], message: str
) -> None:
    change_card(hub, "left", **changes)
    outcome = hubs("check", hub)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_missing_command_names_the_commands(hubs: Hubs) -> None:
    names = "list, show, fetch, check, rank, add, push, pull"
    message = f"hubrl hubs: error: a command is missing, commands: {names}\n"
    assert hubs() == (2, "", message)


def test_exit_code_of_the_process(hub: Path) -> None:
    change_card(hub, "left", license="")
    words = [sys.executable, "-m", "hubrl", "hubs", "check", str(hub)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAILED  left   license" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("name", [path.parent.name for path in BUILT_IN_HUBS.glob("*/hub.yaml")])
def test_hubs_that_ship_with_hubrl(hubs: Hubs, name: str) -> None:
    if not all(spec.is_fetched for spec in load_hub(name, weights=False).encoders):
        pytest.skip(f"{name} is not fetched")
    outcome = hubs("check", name)
    assert outcome.failed == []
    assert outcome.code == 0
