"""Class folders: layouts, classes without images, classes of the test that none learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_files import write_classes, write_image
from small_images import SIZE, write_rgb_hub
from torchvision.datasets import ImageFolder

from hubrl import cli
from vision_tasks.classification import command
from vision_tasks.data import CLASSIFICATION, LANDMARKS, PUBLISHED, load_classification


def test_train_and_test_folders(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"cat": 12, "dog": 3})
    write_classes(tmp_path / "test", {"cat": 1, "dog": 2})
    for name in ("folder", "coco-70", "dmlab"):
        data = load_classification(name, tmp_path, 16, None, 0)
        assert data.names == ("cat", "dog")
        assert data.test.targets.tolist() == [0, 1, 1]
        assert (len(data.train), data.validation.targets.tolist()) == (12, [0, 0, 1])
        assert data.train[0][0].shape == (3, 16, 16)


def test_class_folders_alone_are_split_in_three(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 5, "dog": 10})
    data = load_classification("folder", tmp_path, 16, None, 0)
    assert data.train.targets.tolist() == [0] * 3 + [1] * 6
    assert data.validation.targets.tolist() == data.test.targets.tolist() == [0, 1, 1]


@pytest.mark.parametrize("inner", ["", "2750", "eurosat/2750"])
def test_eurosat_as_torchvision_reads_it(tmp_path: Path, inner: str) -> None:
    write_classes(tmp_path / inner, {"Forest": 5, "River": 5})
    data = load_classification("eurosat", tmp_path, 16, None, 0)
    reference = ImageFolder(str(tmp_path / inner))
    assert list(data.names) == reference.classes
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 2, 2)


def test_splits_stay_for_every_seed_and_limit(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 20, "dog": 20})
    parts = [load_classification("folder", tmp_path, 16, *rest) for rest in ((None, 0), (4, 1))]
    for one, other in zip(parts[0][1:3], parts[1][1:3], strict=True):
        assert all(torch.equal(one[i][0], other[i][0]) for i in range(len(one)))
    assert parts[1].train.targets.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_is_what_models_are_chosen_by(tmp_path: Path, name: str) -> None:
    counts = {"train": (4, 1), "test": (2, 2), name: (1, 3)}
    for part, (n_cats, n_dogs) in counts.items():
        write_classes(tmp_path / part, {"cat": n_cats, "dog": n_dogs})
    data = load_classification("dmlab", tmp_path, 16, None, 0)
    assert data.train.targets.tolist() == [0, 0, 0, 0, 1]
    assert data.validation.targets.tolist() == [0, 1, 1, 1]
    assert data.test.targets.tolist() == [0, 0, 1, 1]

    write_classes(tmp_path / name, {"cow": 1})
    with pytest.raises(ValueError, match=rf"{name}/cow is of no class of .*train"):
        load_classification("dmlab", tmp_path, 16, None, 0)
    other = "validation" if name == "val" else "val"
    (tmp_path / other).mkdir()
    with pytest.raises(ValueError, match=r"has val.* and valid.*: leave one for validation"):
        load_classification("dmlab", tmp_path, 16, None, 0)


def test_a_folder_in_a_class_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 3, "dog": 3, "dog/puppy": 3})
    with pytest.raises(ValueError, match=r"dog/puppy is a folder in a class: move its images up"):
        load_classification("folder", tmp_path, 16, None, 0)


def test_fewer_images_than_published_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "train", {"cat": 12, "dog": 3})
    write_classes(tmp_path / "test", {"cat": 1, "dog": 2})
    load_classification("folder", tmp_path, 16, None, 0)
    assert capsys.readouterr().err == ""
    load_classification("dmlab", tmp_path, 16, None, 0)
    (line,) = capsys.readouterr().err.splitlines()
    assert "dmlab has 15 + 3 images here and 65,550 + 22,735 + 22,628 as published" in line


def test_an_empty_class_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 3})
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"dog has no images .* remove the class"):
        load_classification("folder", tmp_path, 16, None, 0)


def test_a_class_too_small_to_be_split_is_named(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 3, "dog": 2})
    with pytest.raises(ValueError, match=r"class 'dog' has 2 training image\(s\), but needs 3"):
        load_classification("folder", tmp_path, 16, None, 0)


def test_wrong_layouts_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder is not in any package: give --root.*CLASS/\*"):
        load_classification("folder", None, 16, None, 0)
    with pytest.raises(
        NotADirectoryError, match=r"nowhere is no folder; dmlab needs .*train/CLASS"
    ):
        load_classification("dmlab", tmp_path / "nowhere", 16, None, 0)
    with pytest.raises(ValueError, match=r"has no folder train: needed is train/CLASS/\*"):
        load_classification("coco-70", tmp_path, 16, None, 0)
    write_classes(tmp_path / "train", {"cat": 3, "dog": 3})
    with pytest.raises(ValueError, match="has train or test, but not both"):
        load_classification("folder", tmp_path, 16, None, 0)
    write_classes(tmp_path / "test", {"cat": 3, "cow": 3})
    with pytest.raises(ValueError, match=r"test/cow is of no class of .*train"):
        load_classification("folder", tmp_path, 16, None, 0)
    write_classes(tmp_path / "vehicles", {"car": 5, "train": 5})
    assert load_classification("folder", tmp_path / "vehicles", 16, None, 0).names == (
        "car",
        "train",
    )
    write_image(tmp_path / "one" / "cat" / "a.png")
    with pytest.raises(ValueError, match="one has 1 class folders"):
        load_classification("folder", tmp_path / "one", 16, None, 0)


def test_an_unreadable_image_ends_the_command_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "data", {"cat": 5, "dog": 5})
    (tmp_path / "data" / "dog" / "003.png").write_bytes(b"damaged")
    hub = write_rgb_hub(tmp_path / "rgb")
    args = f"--data folder --root {tmp_path / 'data'} --hub {hub} --method single:a --epochs 1"
    args += f" --image-size {SIZE} --device cpu --run-dir {tmp_path / 'run'}"
    with pytest.raises(SystemExit) as stop:
        cli.run(command, "classification", args.split())
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "003.png can't be read as an image" in line


def test_the_page_on_data_has_each_set() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "image-data.md").read_text()
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    rows.pop("--data")
    assert set(rows) == {*CLASSIFICATION, *LANDMARKS}
    for name, counts in PUBLISHED.items():
        assert ", ".join(f"{n:,}" for n in counts) in rows[name]


def test_an_unknown_name_gives_the_closest() -> None:
    with pytest.raises(
        ValueError, match=r"no data set 'cifar100' \(closest: 'cifar-100'\); known: "
    ):
        load_classification("cifar100", None, 16, None, 0)
