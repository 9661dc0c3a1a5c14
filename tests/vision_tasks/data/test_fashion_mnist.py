"""Fashion-MNIST's IDX files: made-up ones in both layouts, and Debian's."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.datasets import FashionMNIST

from vision_tasks.data import load_classification
from vision_tasks.data.fashion_mnist import DEBIAN_FOLDER


def write_idx(file: Path, values: NDArray[np.uint8], zipped: bool) -> None:
    header = np.array([0x800 + values.ndim, *values.shape], dtype=">u4").tobytes()
    data = header + values.tobytes()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".gz" if zipped else "").write_bytes(gzip.compress(data) if zipped else data)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Torchvision's layout."""
    random = np.random.default_rng(0)
    for part, n in (("train", 40), ("t10k", 20)):
        images = random.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        raw = tmp_path / "FashionMNIST" / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", images, zipped=False)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10, False)
    return tmp_path


def test_torchvision_reads_the_same(files: Path) -> None:
    data = load_classification("fashion-mnist", files, 28, None, 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 20)
    assert data.n_outputs == len(data.names) == 10
    reference = FashionMNIST(str(files), train=False)
    for (image, target), grey, label in zip(
        (data.test[i] for i in range(20)), reference.data, reference.targets, strict=True
    ):
        assert torch.equal(image, grey.expand(3, -1, -1))
        assert target == label


def test_debians_layout(files: Path, tmp_path: Path) -> None:
    for file in (files / "FashionMNIST" / "raw").iterdir():
        (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert len(load_classification("fashion-mnist", tmp_path, 28, None, 0).test) == 20


def test_missing_files_name_the_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`apt-get install dataset-fashion-mnist`.*--root"):
        load_classification("fashion-mnist", tmp_path, 28, None, 0)


def test_a_label_outside_the_classes_is_named(files: Path) -> None:
    labels = np.zeros(40, dtype=np.uint8)
    labels[3] = 12
    file = files / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    write_idx(file, labels, zipped=False)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: label 4 is 12, but .* 0 to 9"):
        load_classification("fashion-mnist", files, 28, None, 0)


def test_damaged_files_are_named(files: Path) -> None:
    raw = files / "FashionMNIST" / "raw"
    write_idx(raw / "train-labels-idx1-ubyte", np.zeros(39, dtype=np.uint8), zipped=False)
    with pytest.raises(ValueError, match="has 39 labels for 40 images"):
        load_classification("fashion-mnist", files, 28, None, 0)
    (raw / "train-labels-idx1-ubyte").write_bytes(b"abc")
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is no whole IDX file of 1 axes"):
        load_classification("fashion-mnist", files, 28, None, 0)
    (raw / "train-images-idx3-ubyte").unlink()
    whole = bytearray(gzip.compress(bytes(1000)))
    whole[12] ^= 0xFF  # within what is compressed
    for content in (b"abc", bytes(whole)):
        (raw / "train-images-idx3-ubyte.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz can't be unpacked"):
            load_classification("fashion-mnist", files, 28, None, 0)


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_debians_package() -> None:
    data = load_classification("fashion-mnist", None, 32, 50, 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (50, 1000, 10_000)
    assert data.train.targets.bincount().tolist() == [5] * 10
    # The first test image is an ankle boot.
    image, target = data.test[0]
    assert data.names[int(target)] == "Ankle boot"
    assert image.shape == (3, 32, 32)
