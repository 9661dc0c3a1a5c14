"""
Faces with landmarks in their publishers' files: 300-W, WFLW, COFW and AFLW.

A face is cut out as a square around its box, which is the annotation's, widened to hold all points,
or the points' own where there is none, plus a margin; so all targets lie in 0..1.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vision_tasks.data.images import (
    Box,
    ImageFiles,
    Images,
    Part,
    UnreadableImageError,
    to_tensor,
)
from vision_tasks.data.sources import (
    PointSource,
    existing_file,
    needed_file,
    needed_root,
    read_text,
)

# Shape letters: N images, P points.
Floats = NDArray[np.float64]
T = TypeVar("T")
Eyes = tuple[tuple[int, ...], tuple[int, ...]]

#: Of the longer side of a face's box, at each side.
MARGIN = 0.125
#: Pixels of a face's square, and of its distance from the image: Pillow cuts out no larger ones.
MAX_SIDE, MAX_DISTANCE = 9_000, 1_000_000
IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg")
LAYOUT_300W = (
    "afw/, helen/trainset/, helen/testset/, lfpw/trainset/, lfpw/testset/ and ibug/, each with "
    ".pts files beside their images"
)
TRAIN_300W = ("afw", "helen/trainset", "lfpw/trainset")
#: The common and the challenging subset, which are the full set together.
TEST_300W = ("helen/testset", "lfpw/testset", "ibug")
LAYOUT_WFLW = "WFLW_images/ and WFLW_annotations/list_98pt_rect_attr_train_test/"
LAYOUT_COFW = "COFW_train_color.mat and COFW_test_color.mat"
#: Points whose means are the two ends of the inter-ocular distance.
EYES_300W: Eyes = ((36,), (45,))
EYES_WFLW: Eyes = ((60,), (72,))
EYES_COFW: Eyes = ((8,), (9,))
EYES_AFLW: Eyes = ((6, 7, 8), (9, 10, 11))
LAYOUT_AFLW = (
    "face_landmarks_aflw_train.csv, face_landmarks_aflw_test.csv (columns image_name, scale, "
    "box_size, center_w, center_h, then x and y of 19 points) and the images, in images/ or beside"
)


class Face(NamedTuple):
    """
    An annotation.

    :param points_P2: x and y in pixels, where the centre of the first pixel is 0
    :param box: left, top, right and bottom of the face; None: its points' box
    """

    points_P2: Floats
    box: tuple[float, float, float, float] | None = None


def load_300w(root: Path | None) -> PointSource:
    """
    300-W: 68 points; 3,148 faces for training, 689 for the test (the full set).

    Sagonas, Tzimiropoulos, Zafeiriou, Pantic: "300 Faces in-the-Wild Challenge", ICCV workshops
    2013. Errors are over the distance of the outer corners of the eyes.
    """
    folder = needed_root(root, "300w", LAYOUT_300W)
    train, test = (
        _read_pts([needed_file(folder, part, "300w", LAYOUT_300W) for part in parts])
        for parts in (TRAIN_300W, TEST_300W)
    )
    return PointSource(EYES_300W, train, test)


def load_wflw(root: Path | None) -> PointSource:
    """
    WFLW: 98 points; 7,500 faces for training, 2,500 for the test.

    Wu, Qian, Yang, Wang, Cai, Zhou: "Look at Boundary: A Boundary-Aware Face Alignment Algorithm",
    CVPR 2018. Errors are over the distance of the outer corners of the eyes.
    """
    folder = needed_root(root, "wflw", LAYOUT_WFLW)
    find = partial(needed_file, folder, name="wflw", layout=LAYOUT_WFLW)
    images = find("WFLW_images")
    lists = "WFLW_annotations/list_98pt_rect_attr_train_test/list_98pt_rect_attr"
    train, test = (_read_wflw(find(f"{lists}_{part}.txt"), images) for part in ("train", "test"))
    return PointSource(EYES_WFLW, train, test)


def load_cofw(root: Path | None) -> PointSource:
    """
    COFW: 29 points; 1,345 faces for training, 507 for the test, many of them half hidden.

    Burgos-Artizzu, Perona, Dollár: "Robust Face Landmark Estimation under Occlusion", ICCV 2013.
    The images lie in the MAT files (version 7.3) and are read when they are asked for. Errors are
    over the distance of the outer corners of the eyes.
    """
    folder = needed_root(root, "cofw", LAYOUT_COFW)
    train, test = (
        _read_cofw(needed_file(folder, f"COFW_{part}_color.mat", "cofw", LAYOUT_COFW), suffix)
        for part, suffix in (("train", "Tr"), ("test", "T"))
    )
    return PointSource(EYES_COFW, train, test)


def load_aflw(root: Path | None) -> PointSource:
    """
    AFLW: 19 points; 20,000 faces for training, 4,386 for the test.

    Köstinger, Wohlhart, Roth, Bischof: "Annotated Facial Landmarks in the Wild", ICCV workshops
    2011. The lists are those that go with HRNet's landmark detection, which many others use. Errors
    are over the distance of the middles of the eyes: the literature's, over the size of the box,
    are smaller, above all for faces from the side.
    """
    folder = needed_root(root, "aflw", LAYOUT_AFLW)
    images = folder / "images" if (folder / "images").is_dir() else folder
    find = partial(needed_file, folder, name="aflw", layout=LAYOUT_AFLW)
    lists = (find(f"face_landmarks_aflw_{part}.csv") for part in ("train", "test"))
    train, test = (_read_aflw(list_file, images) for list_file in lists)
    return PointSource(EYES_AFLW, train, test)


def read_pts(file: Path) -> Floats:
    """
    The points (P, 2) of a .pts file, counted from 0; the file counts from 1.

    :raises ValueError: if the file is not whole
    """
    head, _, rest = read_text(file).partition("{")
    try:
        points = np.array([line.split() for line in rest.partition("}")[0].strip().splitlines()])
        n_points = int(head.split("n_points:")[1].split()[0])
        points_P2 = points.astype(np.float64).reshape(n_points, 2)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{file} is no whole .pts file ({error}): replace it") from error
    return points_P2 - 1


def square(face: Face) -> Box:
    """The square, in whole pixels, that is cut out for a face."""
    low, high = face.points_P2.min(0), face.points_P2.max(0)
    if face.box is not None:
        low, high = np.minimum(low, face.box[:2]), np.maximum(high, face.box[2:])
    side = math.ceil((high - low).max() * (1 + 2 * MARGIN)) + 1
    left, top = (math.floor(value) for value in (low + high + 1 - side) / 2)
    return left, top, left + side, top + side


def targets(faces: Sequence[Face], boxes: Sequence[Box]) -> Tensor:
    """Points float32 (N, P, 2) in 0..1 of each square."""
    corners_N12 = np.array([box[:2] for box in boxes])[:, None]
    sides_N11 = np.array([box[2] - box[0] for box in boxes])[:, None, None]
    points_NP2 = np.stack([face.points_P2 for face in faces])
    # Centres of pixels are whole numbers, and half a pixel lies before the first.
    return torch.from_numpy((points_NP2 + 0.5 - corners_N12) / sides_N11).float()


class MatImages:
    """
    Images in a MAT file of version 7.3, which are read when they are asked for.

    :param file: with a list of images
    :param key: of the list
    :param boxes: the part of each image that is wanted
    """

    def __init__(self, file: Path, key: str, boxes: Sequence[Box]) -> None:
        self._file, self._key, self._boxes = file, key, boxes

    def __len__(self) -> int:
        return len(self._boxes)

    def name(self, index: int) -> str:
        """Its number in its list."""
        return f"{self._key}/{index}"

    def read(self, index: int) -> Tensor:
        """One image, uint8 (3, H, W); grey is repeated, black is beyond its borders."""

        def read(mat: Any) -> Any:
            return mat[mat[self._key][0, index]][()]

        try:
            image = _with_mat(self._file, read)
            # MATLAB's axes come in the opposite order: (3, W, H), or (W, H) where it is grey.
            picture = Image.fromarray(np.ascontiguousarray(image.T)).convert("RGB")
        except (ValueError, TypeError, AttributeError) as error:
            raise UnreadableImageError(
                f"{self._file}: image {index + 1} of {self._key} can't be read ({error}): replace "
                "the file"
            ) from error
        return to_tensor(picture.crop(self._boxes[index]))


def _part(faces: Sequence[Face], images: Callable[[list[Box]], Images], place: str) -> Part:
    if not faces:
        raise ValueError(f"{place} lists no face: replace it")
    boxes = [square(face) for face in faces]
    return Part(images(boxes), targets(faces, boxes))


def _read_pts(folders: Sequence[Path]) -> Part:
    files = [file for folder in folders for file in sorted(folder.glob("*.pts"))]
    for folder in folders:
        if not any(folder.glob("*.pts")):
            raise ValueError(f"{folder} has no .pts file; 300w needs {LAYOUT_300W}")
    faces = [Face(read_pts(file)) for file in files]
    for file, face in zip(files, faces, strict=True):
        _check_points(face, 68, EYES_300W, str(file))
    images = [_image_beside(file) for file in files]
    return _part(faces, lambda boxes: ImageFiles(images, boxes), str(folders[0]))


def _image_beside(file: Path) -> Path:
    for suffix in IMAGE_SUFFIXES:
        if file.with_suffix(suffix).is_file():
            return file.with_suffix(suffix)
    raise FileNotFoundError(f"{file} has no image beside it ({', '.join(IMAGE_SUFFIXES)})")


def _read_wflw(list_file: Path, images: Path) -> Part:
    faces, files = [], []
    for number, line in enumerate(read_text(list_file).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{list_file}: line {number}"
        *numbers, name = line.split(maxsplit=206)
        values = _numbers(numbers, where)
        if len(values) != 206:
            raise ValueError(f"{where} has {len(values)} numbers, not 206 (98 points, box, flags)")
        left, top, right, bottom = values[196:200]
        face = Face(np.array(values[:196]).reshape(98, 2), (left, top, right, bottom))
        _check_points(face, 98, EYES_WFLW, where)
        faces.append(face)
        files.append(existing_file(images / name.strip(), where))
    return _part(faces, lambda boxes: ImageFiles(files, boxes), str(list_file))


def _read_aflw(list_file: Path, images: Path) -> Part:
    faces, files = [], []
    for number, cells in enumerate(csv.reader(read_text(list_file).splitlines()), 1):
        if number == 1 or not cells:
            continue
        where = f"{list_file}: line {number}"
        name, *numbers = cells
        if len(numbers) != 4 + 2 * 19:
            raise ValueError(f"{where} has {len(numbers)} numbers, not 42 (box, 19 points)")
        _, size, x, y, *points = _numbers(numbers, where)
        face = Face(
            np.array(points).reshape(19, 2),
            (x - size / 2, y - size / 2, x + size / 2, y + size / 2),
        )
        _check_points(face, 19, EYES_AFLW, where)
        faces.append(face)
        files.append(existing_file(images / name, where))
    return _part(faces, lambda boxes: ImageFiles(files, boxes), str(list_file))


def _read_cofw(file: Path, suffix: str) -> Part:
    def read(mat: Any) -> tuple[Floats, Floats, int]:
        return mat[f"phis{suffix}"][()], mat[f"bboxes{suffix}"][()], mat[f"Is{suffix}"].shape[1]

    # 29 x, 29 y and 29 flags; MATLAB counts pixels from 1.
    rows, boxes, n_images = _with_mat(file, read)
    if rows.shape[0] != 87 or not rows.shape[1] == boxes.shape[1] == n_images:
        raise ValueError(f"{file} has arrays of {rows.shape} and {boxes.shape}: replace it")
    points_NP2 = rows[:58].reshape(2, 29, -1).transpose(2, 1, 0) - 1
    faces = [
        Face(points_P2, (left - 1, top - 1, left - 1 + width, top - 1 + height))
        for points_P2, (left, top, width, height) in zip(points_NP2, boxes.T, strict=True)
    ]
    for number, face in enumerate(faces, 1):
        _check_points(face, 29, EYES_COFW, f"{file}: face {number}")
    return _part(faces, lambda squares: MatImages(file, f"Is{suffix}", squares), str(file))


def _with_mat(file: Path, read: Callable[[Any], T]) -> T:
    """What ``read`` takes out of a MAT file of version 7.3."""
    try:
        import h5py
    except ModuleNotFoundError:
        raise ValueError("COFW needs h5py: `pip install 'hubrl[vision]'`") from None
    try:
        with h5py.File(file) as mat:
            return read(mat)
    except (OSError, KeyError) as error:
        raise ValueError(f"{file} is no whole MAT file of COFW ({error}): replace it") from error


def _numbers(words: Sequence[str], where: str) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_points(face: Face, n_points: int, eyes: Eyes, where: str) -> None:
    if len(face.points_P2) != n_points:
        raise ValueError(f"{where} has {len(face.points_P2)} points, not {n_points}")
    if not np.isfinite(face.points_P2).all():
        raise ValueError(f"{where} has a point that is no number: correct it")
    left_2, right_2 = (face.points_P2[list(eye)].mean(axis=0) for eye in eyes)
    if np.array_equal(left_2, right_2):
        raise ValueError(f"{where} has both eyes at one place: correct it")
    _check_square(face, where)


def _check_square(face: Face, where: str) -> None:
    corners_N2 = np.vstack([face.points_P2, np.reshape(face.box or (), (-1, 2))])
    if not np.isfinite(corners_N2).all():
        raise ValueError(f"{where} has a box that is no number: correct it")
    if np.abs(corners_N2).max() > MAX_DISTANCE:
        raise ValueError(f"{where} has a point or a box far from any image: correct it")
    left, _, right, _ = square(face)
    if right - left > MAX_SIDE:
        raise ValueError(
            f"{where} has a face of {right - left:,} px, allowed: {MAX_SIDE:,} px: correct its "
            "points or its box"
        )
