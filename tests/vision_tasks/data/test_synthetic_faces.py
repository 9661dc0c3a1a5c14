"""Rendered faces: landmarks sit on what they name, whatever the pose; everything has a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vision_tasks.data import face_renderer, load_landmarks, synthetic_faces
from vision_tasks.data.face_renderer import (
    LANDMARKS,
    load_mesh,
    paint,
    rasterise,
    render_face,
    vertex_normals,
)


def test_a_face_follows_from_its_index_and_the_seed() -> None:
    image, points = render_face(3, 64)
    again, same_points = render_face(3, 64)
    assert np.array_equal(image, again)
    assert np.array_equal(points, same_points)
    for other, other_points in (render_face(4, 64), render_face(3, 64, seed=1)):
        assert not np.array_equal(image, other)
        assert not np.array_equal(points, other_points)


def test_faces_are_images_with_points_inside() -> None:
    for index in range(8):
        image, points = render_face(index, 48)
        assert (image.dtype, image.shape) == (np.uint8, (3, 48, 48))
        assert (points.dtype, points.shape) == (np.float32, (68, 2))
        assert points.min() > 0
        assert points.max() < 1
        assert image.std() > 5


def test_the_size_changes_the_image_and_not_the_face() -> None:
    assert np.array_equal(render_face(5, 32)[1], render_face(5, 96)[1])


def test_landmarks_are_where_the_texture_has_them() -> None:
    """A mesh that is white around single landmarks alone shows them where the points are."""
    mesh = load_mesh()
    chosen = [8, 30, 36, 45, 48, 54]
    vertices = [LANDMARKS[i] for i in chosen]
    side = 200
    seen_V3 = (mesh.vertices_V3 * (0.5, 0.5, 1) + (0.5, 0.5, 5)).astype(np.float32)
    pixels_V3 = seen_V3 * np.float32(side)
    surface = rasterise(pixels_V3, mesh.triangles_T3, side)
    white = mesh._replace(texture_HW3=np.ones_like(mesh.texture_HW3))
    for vertex in vertices:
        colours_V3 = np.zeros_like(mesh.vertices_V3)
        colours_V3[vertex] = 1
        picture = np.zeros((side, side, 3), dtype=np.float32)
        paint(picture, surface, white, colours_V3)
        y, x = np.unravel_index(picture[:, :, 0].argmax(), (side, side))
        assert np.abs(pixels_V3[vertex, :2] - (x + 0.5, y + 0.5)).max() < 2


def test_the_nearer_triangle_is_seen() -> None:
    """By hand: two triangles over the same pixels, the second one in front of the first."""
    vertices = np.array(
        [[0, 0, 2], [8, 0, 2], [0, 8, 2], [0, 0, 1], [4, 0, 1], [0, 4, 1]], dtype=np.float32
    )
    triangles = np.array([[0, 1, 2], [3, 4, 5]])
    surface = rasterise(vertices, triangles, 8)
    seen = dict(zip(surface.pixels_N.tolist(), surface.vertices_N3[:, 0].tolist(), strict=True))
    # Pixel centres at (0.5, 0.5), (5.5, 0.5) and (0.5, 6.5); nothing covers (7.5, 7.5).
    assert (seen[0], seen[5], seen[48]) == (3, 0, 0)
    assert 63 not in seen
    shares = surface.shares_3N[:, surface.pixels_N.tolist().index(0)]
    assert shares.tolist() == [0.75, 0.125, 0.125]


def test_normals_look_out_of_the_face() -> None:
    mesh = load_mesh()
    normals_V3 = vertex_normals(mesh.vertices_V3, mesh.triangles_T3)
    assert (normals_V3[list(LANDMARKS[27:31]), 2] < -0.5).all()
    left, right = normals_V3[[234, 454], 0]
    assert left < -0.3 < 0.3 < right


def test_the_mesh_is_symmetric() -> None:
    """Outer corners of eyes and mouth, temples and the jaw mirror each other."""
    vertices_V3 = load_mesh().vertices_V3
    for left, right in ((33, 263), (61, 291), (234, 454), (172, 397)):
        np.testing.assert_allclose(vertices_V3[left] * (-1, 1, 1), vertices_V3[right], atol=1e-6)


def test_the_data_set_is_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBRL_CACHE", str(tmp_path))
    for name, count in (("N_TRAIN", 6), ("N_VALIDATION", 2), ("N_TEST", 3), ("SIZE", 32)):
        monkeypatch.setattr(synthetic_faces, name, count)
    data = load_landmarks("synthetic-faces", None, 24, 4, 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (4, 2, 3)
    assert (data.n_outputs, data.eyes) == (136, ((36,), (45,)))
    image, points = data.test[2]
    assert (image.shape, points.shape) == ((3, 24, 24), (68, 2))
    np.testing.assert_array_equal(points, render_face(10, 32)[1])

    monkeypatch.setattr(face_renderer, "render_face", None)
    monkeypatch.setattr(synthetic_faces, "render_face", None)
    again = load_landmarks("synthetic-faces", None, 24, 4, 1)
    assert torch.equal(again.test[2][0], image)
    with pytest.raises(ValueError, match="synthetic-faces are rendered and need no --root"):
        load_landmarks("synthetic-faces", tmp_path, 24, None, 0)
