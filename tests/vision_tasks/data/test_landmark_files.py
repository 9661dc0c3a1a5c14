"""Landmark files in their real formats: the points are where the crop shows them."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from vision_tasks.data import ImageDataset, load_landmarks
from vision_tasks.data.images import UnreadableImageError
from vision_tasks.data.landmark_files import Face, read_pts, square

SIZE = 64


def face_with_dots(
    n_points: int, seed: int, size: tuple[int, int] = (90, 70)
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A dark image (H, W, 3) with a bright pixel at each of the points (P, 2), counted from 0."""
    random = np.random.default_rng(seed)
    places = random.permutation(40 * 30)[:n_points]
    points = np.stack([25 + places % 40, 20 + places // 40], axis=1)
    image = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    image[points[:, 1], points[:, 0]] = 255
    return image, points.astype(np.float64)


def points_are_bright(dataset: ImageDataset) -> bool:
    """Whether each target of an enlarged image lies in one of its dots."""
    for image, points in (dataset[i] for i in range(len(dataset))):
        x, y = (points * image.shape[1]).long().T
        if not (image[0][y, x] > 130).all():
            return False
    return True


def write(file: Path, image: NDArray[np.uint8]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file)


def write_pts(file: Path, points: NDArray[np.float64]) -> None:
    lines = "\n".join(f"{x + 1:.6f} {y + 1:.6f}" for x, y in points)
    file.write_text(f"version: 1\nn_points:  {len(points)}\n{{\n{lines}\n}}\n")


@pytest.fixture
def folder_300w(tmp_path: Path) -> Path:
    parts = ("afw", "helen/trainset", "lfpw/trainset", "helen/testset", "lfpw/testset", "ibug")
    for seed, part in enumerate(parts):
        for copy in range(2):
            image, points = face_with_dots(68, 10 * seed + copy)
            write(tmp_path / part / f"{copy}.png", image)
            write_pts(tmp_path / part / f"{copy}.pts", points)
    return tmp_path


def test_300w(folder_300w: Path) -> None:
    data = load_landmarks("300w", folder_300w, 256, None, 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (5, 1, 6)
    assert (data.n_outputs, data.eyes) == (136, ((36,), (45,)))
    image, points = data.test[0]
    assert (image.shape, points.dtype, points.shape) == ((3, 256, 256), torch.float32, (68, 2))
    assert all(points_are_bright(part) for part in data[:3])


def test_300w_refuses_what_is_wrong(folder_300w: Path) -> None:
    file = folder_300w / "ibug" / "1.pts"
    write_pts(file, np.zeros((67, 2)))
    with pytest.raises(ValueError, match=r"ibug/1.pts has 67 points, not 68"):
        load_landmarks("300w", folder_300w, SIZE, None, 0)
    write_pts(file, np.ones((68, 2)))
    with pytest.raises(ValueError, match=r"ibug/1.pts has both eyes at one place: correct it"):
        load_landmarks("300w", folder_300w, SIZE, None, 0)
    write_pts(file, np.full((68, 2), np.nan))
    with pytest.raises(ValueError, match=r"ibug/1.pts has a point that is no number"):
        load_landmarks("300w", folder_300w, SIZE, None, 0)
    file.write_text("version: 1\nn_points: 68\n{\n1 2\n")
    with pytest.raises(ValueError, match=r"ibug/1.pts is no whole .pts file .* replace it"):
        load_landmarks("300w", folder_300w, SIZE, None, 0)
    file.unlink()
    (folder_300w / "ibug" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"ibug/0.pts has no image beside it"):
        load_landmarks("300w", folder_300w, SIZE, None, 0)
    (folder_300w / "ibug" / "0.pts").unlink()
    with pytest.raises(ValueError, match=r"ibug has no .pts file; 300w needs afw/"):
        load_landmarks("300w", folder_300w, SIZE, None, 0)
    with pytest.raises(ValueError, match="300w is not in any package: give --root"):
        load_landmarks("300w", None, SIZE, None, 0)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        # From 25 to 20,000, a quarter for margins and a pixel: 19,975 x 1.25 + 1.
        (20_000.0, r"ibug/1.pts has a face of 24,970 px, allowed: 9,000 px: correct its points or"),
        (1e12, r"ibug/1.pts has a point or a box far from any image: correct it"),
    ],
)
def test_a_point_that_is_far_away(x: float, message: str, folder_300w: Path) -> None:
    file = folder_300w / "ibug" / "1.pts"
    points = read_pts(file)
    points[:, 0] = 25.0
    points[7, 0] = x
    points[45, 0] = 30.0
    write_pts(file, points)
    with pytest.raises(ValueError, match=message):
        load_landmarks("300w", folder_300w, SIZE, None, 0)


def test_a_face_of_the_largest_size(folder_300w: Path) -> None:
    """7,198 px, a quarter for margins and a pixel: 8,998.5, rounded up."""
    file = folder_300w / "ibug" / "1.pts"
    points = read_pts(file)
    points[:, 0] = 0
    points[45, 0] = 7_198
    write_pts(file, points)
    image, _ = load_landmarks("300w", folder_300w, SIZE, None, 0).test[5]
    assert image.shape == (3, SIZE, SIZE)


def test_pts_files_count_from_one(tmp_path: Path) -> None:
    (tmp_path / "a.pts").write_text("version: 1\nn_points: 2\n{\n1 1\n10.5 20\n}\n")
    assert read_pts(tmp_path / "a.pts").tolist() == [[0, 0], [9.5, 19]]


def test_the_square_holds_box_and_points_with_a_margin() -> None:
    """A box of 80 by 40, the points' wider by 20 to the left: 100, and an eighth at each side."""
    points = np.array([[0.0, 30], [60, 50]])
    assert square(Face(points, (20, 20, 100, 60))) == (-13, -23, 113, 103)
    assert square(Face(points)) == (-8, 2, 68, 78)


def wflw_line(name: str, points: NDArray[np.float64]) -> str:
    left, top = points.min(0).astype(int)
    right, bottom = points.max(0).astype(int)
    numbers = [*points.flatten(), left, top, right, bottom, 0, 0, 0, 0, 1, 0]
    return " ".join(map(str, numbers)) + f" {name}\n"


def test_wflw(tmp_path: Path) -> None:
    lists = tmp_path / "WFLW_annotations" / "list_98pt_rect_attr_train_test"
    lists.mkdir(parents=True)
    for part, seeds in (("train", (0, 1, 2)), ("test", (3, 4))):
        lines = ""
        for seed in seeds:
            image, points = face_with_dots(98, seed)
            name = f"0--Parade/0 Parade {seed}.png"
            write(tmp_path / "WFLW_images" / name, image)
            lines += wflw_line(name, points)
        (lists / f"list_98pt_rect_attr_{part}.txt").write_text(lines)
    data = load_landmarks("wflw", tmp_path, 256, 2, 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (2, 1, 2)
    assert (data.n_outputs, data.eyes) == (196, ((60,), (72,)))
    assert all(points_are_bright(part) for part in data[:3])

    test_file = lists / "list_98pt_rect_attr_test.txt"
    test_file.write_text(wflw_line("missing.png", points))
    with pytest.raises(FileNotFoundError, match=r"line 1 names .*missing.png, which is missing"):
        load_landmarks("wflw", tmp_path, SIZE, None, 0)
    test_file.write_text("1 2 3 a.png\n")
    with pytest.raises(ValueError, match=r"test.txt: line 1 has 3 numbers, not 206"):
        load_landmarks("wflw", tmp_path, SIZE, None, 0)
    test_file.write_text(wflw_line("a.png", points).replace("0--", "").replace(" ", " x", 1))
    with pytest.raises(ValueError, match=r"test.txt: line 1: could not convert string to float"):
        load_landmarks("wflw", tmp_path, SIZE, None, 0)
    words = wflw_line("a.png", points).split()
    test_file.write_text(" ".join([*words[:198], "nan", *words[199:]]))
    with pytest.raises(ValueError, match=r"test.txt: line 1 has a box that is no number: correct"):
        load_landmarks("wflw", tmp_path, SIZE, None, 0)
    test_file.write_text(" ".join([*words[:198], "20000", *words[199:]]))
    with pytest.raises(ValueError, match=r"test.txt: line 1 has a face of .* px, allowed: 9,000"):
        load_landmarks("wflw", tmp_path, SIZE, None, 0)
    test_file.write_text("\n\n")
    with pytest.raises(ValueError, match=r"test.txt lists no face: replace it"):
        load_landmarks("wflw", tmp_path, SIZE, None, 0)
    test_file.unlink()
    with pytest.raises(FileNotFoundError, match=r"test.txt.*wflw needs .*WFLW_images/ and"):
        load_landmarks("wflw", tmp_path, SIZE, None, 0)


def write_cofw(file: Path, suffix: str, seeds: tuple[int, ...]) -> None:
    """As MATLAB writes it: axes in the opposite order, pixels counted from one, one image grey."""
    with h5py.File(file, "w") as mat:
        references = mat.create_dataset(f"Is{suffix}", (1, len(seeds)), dtype=h5py.ref_dtype)
        rows, boxes = [], []
        for i, seed in enumerate(seeds):
            image, points = face_with_dots(29, seed)
            values = image[:, :, 0] if i == 0 else image
            references[0, i] = mat.create_dataset(f"#refs#/{i}", data=values.T).ref
            rows.append(np.concatenate([points.T.flatten() + 1, np.zeros(29)]))
            boxes.append([30, 25, 20, 20])
        mat[f"phis{suffix}"] = np.array(rows).T
        mat[f"bboxes{suffix}"] = np.array(boxes, dtype=np.float64).T


def test_cofw(tmp_path: Path) -> None:
    write_cofw(tmp_path / "COFW_train_color.mat", "Tr", (0, 1, 2))
    write_cofw(tmp_path / "COFW_test_color.mat", "T", (3, 4))
    data = load_landmarks("cofw", tmp_path, 256, None, 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (2, 1, 2)
    assert (data.n_outputs, data.eyes) == (58, ((8,), (9,)))
    assert all(points_are_bright(part) for part in data[:3])

    with h5py.File(tmp_path / "COFW_test_color.mat", "a") as mat:
        del mat["bboxesT"]
    with pytest.raises(ValueError, match=r"COFW_test_color.mat is no whole MAT file of COFW"):
        load_landmarks("cofw", tmp_path, SIZE, None, 0)
    with h5py.File(tmp_path / "COFW_test_color.mat", "a") as mat:
        mat["bboxesT"] = np.zeros((4, 5))
    with pytest.raises(ValueError, match=r"has arrays of \(87, 2\) and \(4, 5\)"):
        load_landmarks("cofw", tmp_path, SIZE, None, 0)
    (tmp_path / "COFW_test_color.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"COFW_test_color.mat.*cofw needs"):
        load_landmarks("cofw", tmp_path, SIZE, None, 0)


def test_cofw_names_an_image_that_is_none(tmp_path: Path) -> None:
    write_cofw(tmp_path / "COFW_train_color.mat", "Tr", (0, 1, 2))
    write_cofw(tmp_path / "COFW_test_color.mat", "T", (3, 4))
    with h5py.File(tmp_path / "COFW_test_color.mat", "a") as mat:
        del mat["#refs#/1"]
        mat["#refs#/other"] = np.zeros((4, 5, 6, 7))
        mat["IsT"][0, 1] = mat["#refs#/other"].ref
    data = load_landmarks("cofw", tmp_path, SIZE, None, 0)
    message = r"COFW_test_color.mat: image 2 of IsT can't be read .*: replace the file"
    with pytest.raises(UnreadableImageError, match=message):
        data.test[1]


def test_cofw_needs_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COFW_train_color.mat", "COFW_test_color.mat"):
        (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ValueError, match=r"COFW needs h5py: `pip install 'hubrl\[vision\]'`"):
        load_landmarks("cofw", tmp_path, SIZE, None, 0)


def write_aflw(file: Path, names: list[str], points: list[NDArray[np.float64]]) -> None:
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        axes = [f"original_{i}_{axis}" for i in range(len(points[0])) for axis in "xy"]
        writer.writerow(["image_name", "scale", "box_size", "center_w", "center_h", *axes])
        for name, face in zip(names, points, strict=True):
            x, y = face.mean(0)
            writer.writerow([name, 0.25, 50, x, y, *face.flatten()])


def test_aflw(tmp_path: Path) -> None:
    points = []
    for seed in range(5):
        image, face = face_with_dots(19, seed)
        write(tmp_path / "images" / "0" / f"{seed}.png", image)
        points.append(face)
    names = [f"0/{seed}.png" for seed in range(5)]
    write_aflw(tmp_path / "face_landmarks_aflw_train.csv", names[:3], points[:3])
    write_aflw(tmp_path / "face_landmarks_aflw_test.csv", names[3:], points[3:])
    data = load_landmarks("aflw", tmp_path, 256, None, 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (2, 1, 2)
    assert (data.n_outputs, data.eyes) == (38, ((6, 7, 8), (9, 10, 11)))
    assert all(points_are_bright(part) for part in data[:3])

    write_aflw(tmp_path / "face_landmarks_aflw_test.csv", names[:1], [points[0][:18]])
    with pytest.raises(ValueError, match=r"aflw_test.csv: line 2 has 40 numbers, not 42"):
        load_landmarks("aflw", tmp_path, SIZE, None, 0)
    file = tmp_path / "face_landmarks_aflw_test.csv"
    write_aflw(file, names[:1], points[:1])
    whole = file.read_text()
    file.write_text(whole.replace(",50,", ",large,"))
    with pytest.raises(ValueError, match=r"aflw_test.csv: line 2: could not convert string to fl"):
        load_landmarks("aflw", tmp_path, SIZE, None, 0)
    file.write_text(whole.splitlines()[0] + "\n\n")
    with pytest.raises(ValueError, match=r"aflw_test.csv lists no face: replace it"):
        load_landmarks("aflw", tmp_path, SIZE, None, 0)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"aflw_test.csv.*aflw needs"):
        load_landmarks("aflw", tmp_path, SIZE, None, 0)


def test_an_unknown_name_gives_the_closest() -> None:
    with pytest.raises(ValueError, match=r"no data set 'wflv' \(closest: 'wflw'\)"):
        load_landmarks("wflv", None, SIZE, None, 0)
