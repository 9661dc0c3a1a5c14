"""Images come out as squares of three channels, and a file that holds none is named."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from image_files import write_image
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader

from vision_tasks.data.images import (
    ImageArray,
    ImageDataset,
    ImageFiles,
    Part,
    UnreadableImageError,
    read_image,
    resize,
)


def test_images_in_memory_are_resized_when_read() -> None:
    images = torch.randint(0, 256, (5, 1, 8, 6), dtype=torch.uint8)
    dataset = ImageDataset(Part(ImageArray(images), torch.arange(5)), np.array([3, 1]), 12)
    image, target = dataset[0]
    assert len(dataset) == 2
    assert (image.dtype, image.shape, int(target)) == (torch.uint8, (3, 12, 12), 3)
    assert torch.equal(image[0], image[2])
    assert dataset.targets.tolist() == [3, 1]
    batch, targets = next(iter(DataLoader(dataset, 2)))
    assert batch.shape == (2, 3, 12, 12)
    assert targets.tolist() == [3, 1]


def test_an_image_of_that_size_stays_as_it_is() -> None:
    image = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8)
    assert torch.equal(resize(image, 9), image)


def test_resizing_is_that_of_pillow() -> None:
    """Its bilinear filter antialiases; both round, so that they differ by one at most."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    resized = resize(torch.from_numpy(pixels).permute(2, 0, 1), 17)
    expected = Image.fromarray(pixels).resize((17, 17), Image.Resampling.BILINEAR)
    difference = resized.permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()
    assert difference.abs().max() <= 1


def test_files_are_read_when_asked_for(tmp_path: Path) -> None:
    pixels = write_image(tmp_path / "a.png")
    images = ImageFiles([tmp_path / "a.png", tmp_path / "missing.png"])
    assert len(images) == 2
    assert np.array_equal(images.read(0).permute(1, 2, 0).numpy(), pixels)


def test_a_box_may_reach_beyond_the_image(tmp_path: Path) -> None:
    pixels = write_image(tmp_path / "a.png")
    image = ImageFiles([tmp_path / "a.png"], [(-3, 2, 7, 12)]).read(0).permute(1, 2, 0).numpy()
    assert image.shape == (10, 10, 3)
    assert not image[:, :3].any()
    assert np.array_equal(image[:, 3:], pixels[2:12, :7])


@pytest.mark.parametrize("orientation", range(10))
def test_images_are_upright_where_no_points_refer_to_them(orientation: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        upright = np.array(ImageOps.exif_transpose(image))
    read = ImageFiles([tmp_path / "a.png"]).read(0).permute(1, 2, 0).numpy()
    assert np.array_equal(read, upright)
    boxed = ImageFiles([tmp_path / "a.png"], [(0, 0, 6, 4)]).read(0).permute(1, 2, 0).numpy()
    assert np.array_equal(boxed, pixels)


def test_damaged_metadata_say_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png", exif=b"Exif\0\0XX*\0\1\2")
    assert ImageFiles([tmp_path / "a.png"]).read(0).shape == (3, 4, 6)


def test_what_tells_images_apart(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("cat/a.png", "cat/b.png", "dog/a.png")]

    def sha256(rows: list[int], targets: list[int], files: list[Path] = files) -> str:
        part = Part(ImageFiles(files), torch.tensor(targets))
        return ImageDataset(part, np.array(rows), 8).sha256

    same = sha256([0, 2], [0, 0, 1])
    assert same == sha256([0, 2], [0, 0, 1], [Path("elsewhere", *f.parts[-2:]) for f in files])
    assert len({same, sha256([0, 1], [0, 0, 1]), sha256([2, 0], [0, 0, 1])}) == 3
    assert same != sha256([0, 2], [0, 0, 0])
    array = Part(ImageArray(torch.zeros(3, 1, 8, 8, dtype=torch.uint8)), torch.zeros(3))
    assert (
        ImageDataset(array, np.array([0]), 8).sha256 != ImageDataset(array, np.array([1]), 8).sha256
    )


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    rgba = np.array([[[255, 0, 0, 255], [0, 0, 0, 0]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert np.array(read_image(tmp_path / "a.png")).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_grey_files_have_three_channels(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 7, dtype=np.uint8)).save(tmp_path / "a.png")
    assert (np.array(read_image(tmp_path / "a.png")) == 7).all()


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    write_image(tmp_path / "whole.png", size=(200, 200))
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    for name in ("text.jpg", "half.png", "missing.png"):
        with pytest.raises(
            UnreadableImageError, match=rf"{name} can't be read as an image .* remove it"
        ):
            read_image(tmp_path / name)


def test_an_image_that_would_fill_the_memory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "huge.png", size=(200, 200))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses twice as many
    with pytest.raises(UnreadableImageError, match=r"huge.png can't be read as an image .*bomb"):
        read_image(tmp_path / "huge.png")


def test_a_worker_process_names_it_in_one_line(tmp_path: Path) -> None:
    part = Part(ImageFiles([tmp_path / "missing.png"]), torch.zeros(1))
    loader = DataLoader(ImageDataset(part, np.array([0]), 8), num_workers=1)
    with pytest.raises(
        UnreadableImageError, match=r"^[^ ]*missing.png can't be read .* train anew$"
    ):
        next(iter(loader))


def test_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 300, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UnreadableImageError, match=r"deep.png has more than 8 bits a colour"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("channels", [3, 4])
def test_colours_of_16_bits_are_refused(channels: int, suffix: str, tmp_path: Path) -> None:
    """Pillow would read the upper byte, which is 15 of 255 in the white of a 12-bit camera."""
    file = tmp_path / f"deep.{suffix}"
    cv2.imwrite(str(file), np.full((4, 4, channels), 4095, dtype=np.uint16))
    with pytest.raises(UnreadableImageError, match=rf"deep.{suffix} has more than 8 bits a colour"):
        read_image(file)
