"""Hubs that are pushed and pulled: through folders and through a stand-in of Hugging Face."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hugging_face import Service
from small_hubs import add_golden, call_hubs, nature_spec, write_hub

from hubrl.files import file_sha256
from hubrl.sharing import pull, push
from hubrl.specs import load_hub

# huggingface_hub's own, when it uploads
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FILES = {"hub.yaml", "left.safetensors", "right.safetensors"}


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Folder of a hub of two encoders, with a file beside it that is nobody's business."""
    folder = write_hub(tmp_path / "pair", [nature_spec("left"), nature_spec("right")])
    add_golden(folder)
    (folder / "notes.txt").write_text("private")
    return folder


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def change(hub: Path, **card: object) -> None:
    """Change keys of the first card."""
    data = yaml.safe_load((hub / "hub.yaml").read_text())
    data["encoders"][0].update(card)
    (hub / "hub.yaml").write_text(yaml.safe_dump(data))


def test_a_hub_comes_back_from_a_folder(hub5: Path, tmp_path: Path) -> None:
    push(load_hub(hub5), str(tmp_path / "shared"))
    hub = pull(str(tmp_path / "shared"), tmp_path / "mine")
    assert [spec.sha256 for spec in hub.encoders] == [s.sha256 for s in load_hub(hub5).encoders]
    for spec in hub.encoders:
        assert spec.weights is not None
        assert file_sha256(tmp_path / "mine" / spec.weights) == spec.sha256
    assert sorted(file.name for file in (tmp_path / "mine").iterdir()) == [
        *(f"{letter}.safetensors" for letter in "abcde"),
        "hub.yaml",
    ]


def test_places_that_exist_are_left_alone(hub5: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").touch()
    with pytest.raises(ValueError, match="there exists and is not empty; give a new folder"):
        push(load_hub(hub5), str(tmp_path / "there"))
    with pytest.raises(ValueError, match="there exists and is not empty; give a new folder"):
        pull(str(hub5), tmp_path / "there")
    (tmp_path / "there" / "mine.txt").unlink()
    assert pull(str(hub5), tmp_path / "there").encoder_names == load_hub(hub5).encoder_names
    assert not (tmp_path / "there" / "hub").exists()


def test_a_file_that_is_another_one_is_not_taken(hub5: Path, tmp_path: Path) -> None:
    (hub5 / "c.safetensors").write_bytes((hub5 / "a.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"encoder 'c': .* has sha256 .*, its card says"):
        pull(str(hub5), tmp_path / "mine")
    with pytest.raises(ValueError, match=r"encoder 'c': .* has sha256 .*, its card says"):
        push(load_hub(hub5), str(tmp_path / "shared"))
    (hub5 / "c.safetensors").unlink()
    with pytest.raises(ValueError, match=r"c\.safetensors is missing: .* is no hub"):
        pull(str(hub5), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize("weights", ["../stolen.safetensors", "/tmp/stolen.safetensors"])
def test_a_card_cannot_reach_outside_its_hub(weights: str, hub5: Path, tmp_path: Path) -> None:
    cards = yaml.safe_load((hub5 / "hub.yaml").read_text())
    cards["encoders"][0]["weights"] = weights
    (hub5 / "hub.yaml").write_text(yaml.safe_dump(cards))
    with pytest.raises(ValueError, match="allowed: a file inside the hub's folder"):
        pull(str(hub5), tmp_path / "deep" / "mine")
    assert not (tmp_path / "deep").exists()


def test_a_hub_that_ships_begins_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call_hubs("pull", "atari5", "mine")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("mine: mine, 5 encoders, ")
    hub = load_hub(tmp_path / "mine")
    assert hub.encoders == load_hub("atari5").encoders
    assert hub.name == "mine", "folders of runs are named after it"
    assert hub.description == f"Begun with atari5: {load_hub('atari5').description}"
    clash = call_hubs("pull", "atari5", "atari5")
    assert clash.code == 2
    assert "out atari5 is the name of a hub that ships with hubrl, allowed: another" in clash.err
    assert names(tmp_path) == {f"mine/{file}" for file in names(tmp_path / "mine")}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (
            "atari6",
            r"place 'atari6' is unknown \(closest: 'atari5'\), allowed: OWNER/NAME of a Hug",
        ),
        ("a/b/c", "place 'a/b/c' is unknown, allowed: OWNER/NAME"),
    ],
)
def test_places_that_are_none(place: str, message: str, hub5: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pull(place, tmp_path / "mine")
    with pytest.raises(ValueError, match=message):
        push(load_hub(hub5), place)


def test_a_card_without_a_license_is_not_pushed(pair: Path, tmp_path: Path) -> None:
    change(pair, license="unknown")
    with pytest.raises(ValueError, match="encoder 'left': license is 'unknown', allowed in a hub"):
        push(load_hub(pair), str(tmp_path / "shared"))
    assert not (tmp_path / "shared").exists()


def test_files_of_other_kinds_are_not_shared(pair: Path, tmp_path: Path) -> None:
    (pair / "left.safetensors").rename(pair / ".bashrc")
    change(pair, weights=".bashrc")
    with pytest.raises(ValueError, match=r"weights is '.bashrc', allowed in a hub that is shared"):
        pull(str(pair), tmp_path / "mine")
    with pytest.raises(ValueError, match=r"weights is '.bashrc', allowed in a hub that is shared"):
        push(load_hub(pair), str(tmp_path / "shared"))


def test_a_hub_comes_back_from_the_service(
    hugging_face: Service, pair: Path, tmp_path: Path
) -> None:
    pushed = call_hubs("push", pair, "someone/pair")
    assert pushed.code == 0, pushed.err
    held = hugging_face.repositories["someone/pair"]
    assert set(held) == FILES
    assert held["left.safetensors"] == (pair / "left.safetensors").read_bytes()
    # The service adds files of its own; they stay there.
    held |= {".gitattributes": b"", "evil.py": b"1 / 0"}
    pulled = call_hubs("pull", "someone/pair", tmp_path / "mine")
    assert pulled.code == 0, pulled.err
    assert names(tmp_path / "mine") == FILES
    assert load_hub(tmp_path / "mine").encoders == load_hub(pair).encoders
    assert call_hubs("check", tmp_path / "mine").code == 0
    assert not [request for request in hugging_face.requests if "evil" in request]


def test_a_repository_that_is_not_there(hugging_face: Service, tmp_path: Path) -> None:
    outcome = call_hubs("pull", "someone/nothing", tmp_path / "mine")
    assert outcome.code == 2
    assert "someone/nothing/hub.yaml can't be downloaded (" in outcome.err
    assert outcome.err.count("\n") == 1
    hugging_face.repositories["someone/empty"] = {}
    outcome = call_hubs("pull", "someone/empty", tmp_path / "mine")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "someone/empty has no file hub.yaml; look it up on Hugging Face" in outcome.err
    assert not (tmp_path / "mine").exists()


def test_a_service_that_refuses(
    hugging_face: Service, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    outcome = call_hubs("push", pair, "someone/pair")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "someone/pair can't be written to (" in outcome.err
    assert "that you are logged in (hf auth login)" in outcome.err


def test_without_a_network(
    hugging_face: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outcome = call_hubs("pull", "someone/pair", tmp_path / "mine")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "check the name and the network" in outcome.err
    assert hugging_face.requests == []


def test_a_repository_whose_file_was_replaced(
    hugging_face: Service, pair: Path, tmp_path: Path
) -> None:
    call_hubs("push", pair, "someone/pair")
    files = hugging_face.repositories["someone/pair"]
    files["right.safetensors"] = files["left.safetensors"]
    outcome = call_hubs("pull", "someone/pair", tmp_path / "mine")
    assert outcome.code == 2
    assert "encoder 'right'" in outcome.err
    assert "its card says" in outcome.err
    assert not (tmp_path / "mine").exists()
