"""Data sets with lists, in their real layouts: the same as torchvision reads, and wrong lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import write_image
from scipy.io import savemat
from torchvision.datasets import FGVCAircraft, StanfordCars
from torchvision.transforms.functional import pil_to_tensor

from vision_tasks.data import ImageDataset, load_classification
from vision_tasks.data.images import resize


def same(dataset: ImageDataset, reference: Any) -> bool:
    """Whether both have the same images and labels in the same order."""
    pairs = zip((dataset[i] for i in range(len(dataset))), reference, strict=True)
    return all(
        torch.equal(image, resize(pil_to_tensor(other), 16)) and target == label
        for (image, target), (other, label) in pairs
    )


def test_cifar100_binary(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    records = random.integers(0, 256, (9, 3074), dtype=np.uint8)
    records[:, 1] = np.arange(9) % 3
    records[:6].tofile(folder / "train.bin")
    records[6:].tofile(folder / "test.bin")
    (folder / "fine_label_names.txt").write_text("apple\nbear\ncat\n\n")
    for root in (tmp_path, folder):
        data = load_classification("cifar-100", root, 32, None, 0)
        assert data.names == ("apple", "bear", "cat")
        assert data.train.targets.tolist() == data.validation.targets.tolist() == [0, 1, 2]
        image, target = data.test[1]
        # Red, then green, then blue, each row by row.
        assert image.flatten().tolist() == records[7, 2:].tolist()
        assert target == 1


def test_cifar100_refuses_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no fine_label_names.txt.*pickles can run code"):
        load_classification("cifar-100", tmp_path, 32, None, 0)
    (tmp_path / "fine_label_names.txt").write_text("apple\nbear\n")
    np.zeros(3000, dtype=np.uint8).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"train.bin has no whole number of records of 3074 bytes"):
        load_classification("cifar-100", tmp_path, 32, None, 0)
    np.full(3074, 7, dtype=np.uint8).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match=r"train.bin: record 1 has label 7, but there are 2 class"):
        load_classification("cifar-100", tmp_path, 32, None, 0)


def write_cars(root: Path, classes: list[int]) -> None:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer", "Acura RL"], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class")]
    files = {"cars_train": "devkit/cars_train_annos", "cars_test": "cars_test_annos_withlabels"}
    for part, file in files.items():
        records = np.empty((1, len(classes)), dtype=[*fields, ("fname", object)])
        for i, label in enumerate(classes):
            records[0, i] = (1, 1, 9, 9, label, f"{i + 1:05}.jpg")
            write_image(folder / part / f"{i + 1:05}.jpg", seed=i)
        savemat(folder / f"{file}.mat", {"annotations": records})


def test_stanford_cars_as_torchvision_reads_them(tmp_path: Path) -> None:
    write_cars(tmp_path, [1, 2, 2, 1, 2])
    data = load_classification("stanford-cars", tmp_path, 16, None, 0)
    assert data.names == ("AM General Hummer", "Acura RL")
    assert same(data.test, StanfordCars(tmp_path, split="test"))
    assert data.train.targets.tolist() == [1, 0, 1]


def test_stanford_cars_refuse_what_is_wrong(tmp_path: Path) -> None:
    write_cars(tmp_path, [1, 2, 5])
    with pytest.raises(
        ValueError, match=r"train_annos.mat: record 3 has label 5, but .* 2 classes"
    ):
        load_classification("stanford-cars", tmp_path, 16, None, 0)
    (tmp_path / "stanford_cars" / "cars_train" / "00002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"record 2 names .*00002.jpg, which is missing"):
        load_classification("stanford-cars", tmp_path, 16, None, 0)
    meta = tmp_path / "stanford_cars" / "devkit" / "cars_meta.mat"
    savemat(meta, {"names": np.zeros(2)})
    with pytest.raises(ValueError, match=r"cars_meta.mat has no class_names: replace it"):
        load_classification("stanford-cars", tmp_path, 16, None, 0)
    meta.write_text("text")
    with pytest.raises(ValueError, match=r"cars_meta.mat can't be read as a MAT file"):
        load_classification("stanford-cars", tmp_path, 16, None, 0)


def test_a_damaged_list_of_cars_is_named(tmp_path: Path) -> None:
    write_cars(tmp_path, [1, 2])
    annotations = tmp_path / "stanford_cars" / "devkit" / "cars_train_annos.mat"
    records = np.empty((1, 1), dtype=[("bbox_x1", object), ("fname", object)])
    records[0, 0] = (1, "00001.jpg")
    savemat(annotations, {"annotations": records}, do_compression=True)
    with pytest.raises(ValueError, match=r"train_annos.mat has annotations without class: needed"):
        load_classification("stanford-cars", tmp_path, 16, None, 0)

    whole = annotations.read_bytes()
    spoilt = whole[:136] + b"\xff\xff" + whole[138:]  # where compression begins
    for content in (whole[: len(whole) // 2], spoilt):
        annotations.write_bytes(content)
        with pytest.raises(ValueError, match=r"train_annos.mat can't be read as a MAT file \("):
            load_classification("stanford-cars", tmp_path, 16, None, 0)


def test_a_list_that_is_no_text_is_named(tmp_path: Path) -> None:
    folder = write_aircraft(tmp_path)
    (folder / "variants.txt").write_bytes("Embraer Légend\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"variants.txt is no text in UTF-8 .*: replace or co"):
        load_classification("fgvc-aircraft", tmp_path, 16, None, 0)


def write_aircraft(root: Path) -> Path:
    folder = root / "fgvc-aircraft-2013b" / "data"
    folder.mkdir(parents=True)
    (folder / "variants.txt").write_text("707-320\nF/A-18\nModel B200\n")
    for start, part in ((0, "train"), (10, "val"), (20, "test")):
        names = ["Model B200", "707-320", "F/A-18", "707-320"]
        lines = [f"{start + i:07} {name}\n" for i, name in enumerate(names)]
        (folder / f"images_variant_{part}.txt").write_text("".join(lines))
        for i in range(4):
            write_image(folder / "images" / f"{start + i:07}.jpg", seed=start + i)
    return folder


def test_aircraft_as_torchvision_reads_them(tmp_path: Path) -> None:
    folder = write_aircraft(tmp_path)
    for root in (tmp_path, folder.parent, folder):
        data = load_classification("fgvc-aircraft", root, 16, None, 0)
        for dataset, part in zip(data[:3], ("train", "val", "test"), strict=True):
            assert same(dataset, FGVCAircraft(tmp_path, split=part))
    assert data.names[1] == "F/A-18"


def test_aircraft_refuse_what_is_wrong(tmp_path: Path) -> None:
    folder = write_aircraft(tmp_path)
    (folder / "images_variant_val.txt").write_text("0000010 707-320\n\n0000011 747\n")
    with pytest.raises(ValueError, match=r"val.txt: line 3 is of class '747', .* of the 3"):
        load_classification("fgvc-aircraft", tmp_path, 16, None, 0)
    (folder / "images_variant_val.txt").write_text("")
    with pytest.raises(ValueError, match=r"val.txt names no image"):
        load_classification("fgvc-aircraft", tmp_path, 16, None, 0)
    (folder / "images_variant_val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no images_variant_val.txt; fgvc-aircraft needs"):
        load_classification("fgvc-aircraft", tmp_path, 16, None, 0)


def test_mit_indoors(tmp_path: Path) -> None:
    for i, name in enumerate(("bar", "bar", "office", "office")):
        write_image(tmp_path / "Images" / name / f"{i}.jpg", seed=i)
    (tmp_path / "TrainImages.txt").write_text("office/2.jpg\nbar/0.jpg\noffice/3.jpg\nbar/1.jpg\n")
    (tmp_path / "TestImages.txt").write_text("office/2.jpg\n")
    data = load_classification("mit-indoors", tmp_path, 16, None, 0)
    assert data.names == ("bar", "office")
    assert data.train.targets.tolist() == data.validation.targets.tolist() == [1, 0]
    assert data.test.targets.tolist() == [1]

    (tmp_path / "TestImages.txt").write_text("office/2.jpg\nkitchen/9.jpg\n")
    with pytest.raises(ValueError, match=r"TestImages.txt: line 2 is of class 'kitchen'"):
        load_classification("mit-indoors", tmp_path, 16, None, 0)
    (tmp_path / "TestImages.txt").write_text("office/9.jpg\n")
    with pytest.raises(FileNotFoundError, match=r"line 1 names .*9.jpg, which is missing"):
        load_classification("mit-indoors", tmp_path, 16, None, 0)
