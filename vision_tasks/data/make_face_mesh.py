"""
Makes ``face/mesh.safetensors`` and ``face/texture.png`` once: nobody who uses hubrl needs to.

    python3.11 -m venv throw-away
    throw-away/bin/pip install "numpy<2" mediapipe==0.10.21 scikit-image safetensors
    throw-away/bin/python vision_tasks/data/make_face_mesh.py vision_tasks/data/face

MediaPipe's face landmark model (Apache-2.0) lays a mesh of 468 points over the face of
scikit-image's ``astronaut``, a photograph by NASA (public domain). The mesh is turned to the front
and made symmetric; eyes and mouth, which it leaves open, are closed by triangles; two rings around
it carry hair and neck. Of the photograph only the head's surroundings are kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mediapipe
import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file
from scipy.optimize import linear_sum_assignment

# Shape letters: V vertices, T triangles, N rows of any array.
Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Edge = tuple[int, int]

#: Points that mirror each other: corners of eyes and mouth, temples, jaw, brows.
MIRRORED = [(33, 263), (133, 362), (61, 291), (234, 454), (172, 397), (93, 323), (105, 334)]
#: Size of each ring around the face, how far it lies behind it (in face widths), its opacity.
RINGS = [(1.17, 0.12, 1.0), (1.42, 0.45, 0.0)]


def main(folder: Path) -> None:
    """Write both files into the folder."""
    photo = skimage.data.astronaut()
    points_V3 = find_mesh(photo)
    edges = set(mediapipe.solutions.face_mesh_connections.FACEMESH_TESSELATION)
    triangles_T3 = triangles_of(edges)
    vertices_V3 = normalise(symmetric(points_V3, mirror_partners(points_V3)))
    triangles_T3, outline = close_holes(triangles_T3, points_V3)
    vertices_V3, uv_V2, opacity_V, triangles_T3 = add_rings(
        vertices_V3, points_V3[:, :2], triangles_T3, outline
    )
    triangles_T3 = turned_outwards(triangles_T3, vertices_V3)
    low, high = np.floor(uv_V2.min(0)).astype(int), np.ceil(uv_V2.max(0)).astype(int) + 1
    Image.fromarray(photo[low[1] : high[1], low[0] : high[0]]).save(folder / "texture.png")
    mesh = {
        "vertices": vertices_V3.astype(np.float32),
        "uv": (uv_V2 - low).astype(np.float32),
        "opacity": opacity_V.astype(np.float32),
        "triangles": triangles_T3.astype(np.int16),
    }
    save_file(mesh, folder / "mesh.safetensors")


def find_mesh(photo: NDArray[np.uint8]) -> Floats:
    """(468, 3): x to the right, y down and z away from the camera, in pixels."""
    finder = mediapipe.solutions.face_mesh.FaceMesh(static_image_mode=True, max_num_faces=1)
    found = finder.process(photo).multi_face_landmarks[0].landmark
    height, width = photo.shape[:2]
    return np.array([(p.x * width, p.y * height, p.z * width) for p in found])


def triangles_of(edges: set[Edge]) -> Ints:
    """Triangles (T, 3) that the edges enclose."""
    following: dict[int, set[int]] = {}
    for a, b in edges:
        following.setdefault(a, set()).add(b)
        following.setdefault(b, set()).add(a)
    cycles = [
        (a, b, c)
        for a in following
        for b in following[a]
        for c in following[a] & following[b]
        if a < b < c
    ]
    # Three triangles around a vertex enclose it, and so do their outer edges.
    apexes = apexes_of(np.array(cycles))
    faces = [t for t in cycles if any(len(apexes[edge]) < 3 for edge in edges_of(t))]
    return np.array(sorted(faces))


def edges_of(triangle: Sequence[int]) -> list[Edge]:
    """Three pairs of vertices, the smaller first."""
    a, b, c = sorted(int(vertex) for vertex in triangle)
    return [(a, b), (a, c), (b, c)]


def apexes_of(triangles_T3: Ints) -> dict[Edge, list[int]]:
    """For each edge the vertices that make a triangle with it."""
    apexes: dict[Edge, list[int]] = {}
    for triangle in triangles_T3.tolist():
        for edge in edges_of(triangle):
            apexes.setdefault(edge, []).append(sum(triangle) - sum(edge))
    return apexes


def close_holes(triangles_T3: Ints, points_V3: Floats) -> tuple[Ints, list[int]]:
    """With the mouth's and the eyes' triangles; and the vertices of the face's outline."""
    loops = sorted(boundary_loops(triangles_T3), key=len)
    outline = loops.pop()
    added = [triangle for loop in loops for triangle in zip_loop(loop, points_V3)]
    return np.concatenate([triangles_T3, np.array(added)]), outline


def boundary_loops(triangles_T3: Ints) -> list[list[int]]:
    """Closed ways along the edges that only one triangle has, as lists of vertices."""
    neighbours: dict[int, list[int]] = {}
    for (a, b), apexes in apexes_of(triangles_T3).items():
        if len(apexes) == 1:
            neighbours.setdefault(a, []).append(b)
            neighbours.setdefault(b, []).append(a)
    loops = []
    while neighbours:
        loop = [next(iter(neighbours))]
        while ahead := [v for v in neighbours.pop(loop[-1]) if v in neighbours]:
            loop.append(ahead[0])
        loops.append(loop)
    return loops


def zip_loop(loop: list[int], points_V3: Floats) -> list[tuple[int, int, int]]:
    """Triangles that fill a loop, between its two ways from the left to the right corner."""
    x = points_V3[loop, 0]
    left, right = int(x.argmin()), int(x.argmax())
    turned = loop[left:] + loop[:left]
    middle = (right - left) % len(loop)
    one, other = turned[: middle + 1], [turned[0], *turned[: middle - 1 : -1]]
    n = max(len(one), len(other))
    steps = np.arange(n) / (n - 1)
    ones = [one[round(step * (len(one) - 1))] for step in steps]
    others = [other[round(step * (len(other) - 1))] for step in steps]
    quads = zip(ones, ones[1:], others, others[1:], strict=False)
    triangles = [t for a, b, c, d in quads for t in ((a, b, c), (b, d, c))]
    return [t for t in triangles if len(set(t)) == 3]


def symmetric(points_V3: Floats, partners_V: Ints) -> Floats:
    """The mesh turned so that x = 0 mirrors it, and averaged with its mirror image."""
    centred_V3 = points_V3 - points_V3.mean(0)
    reflection = fit_mirror(centred_V3, centred_V3[partners_V])
    # The normal of the mirror's plane is the eigenvector of eigenvalue -1.
    values, vectors = np.linalg.eigh((reflection + reflection.T) / 2)
    right = vectors[:, values.argmin()]
    right = right * np.sign(right[0])
    back = np.array([0.0, 0.0, 1.0]) - right[2] * right
    back /= np.linalg.norm(back)
    turned_V3 = centred_V3 @ np.stack([right, np.cross(back, right), back], axis=1)
    mean_V3: Floats = (turned_V3 + turned_V3[partners_V] * (-1, 1, 1)) / 2
    return mean_V3


def mirror_partners(points_V3: Floats) -> Ints:
    """(V,): the vertex that mirrors each one; found together with the plane between them."""
    centred_V3 = points_V3 - points_V3.mean(0)
    sources, targets = np.concatenate([MIRRORED, np.array(MIRRORED)[:, ::-1]]).T
    for _ in range(20):
        reflection = fit_mirror(centred_V3[sources], centred_V3[targets])
        mirrored_V3 = centred_V3 @ reflection.T
        distances_VV = np.linalg.norm(mirrored_V3[:, None] - centred_V3[None], axis=2)
        sources, targets = linear_sum_assignment(distances_VV + distances_VV.T)
    partners_V: Ints = targets
    if (partners_V[partners_V] != sources).any():
        raise RuntimeError("the mesh has vertices without a partner")
    return partners_V


def fit_mirror(sources_N3: Floats, targets_N3: Floats) -> Floats:
    """The reflection (3, 3) that takes centred sources nearest to their targets (Kabsch)."""
    u, _, v = np.linalg.svd(sources_N3.T @ targets_N3)
    sign = -np.sign(np.linalg.det(v.T @ u.T))
    reflection: Floats = v.T @ np.diag([1.0, 1.0, sign]) @ u.T
    return reflection


def normalise(vertices_V3: Floats) -> Floats:
    """Centre of its box at 0, and 1 wide."""
    low, high = vertices_V3.min(0), vertices_V3.max(0)
    normalised_V3: Floats = (vertices_V3 - (low + high) / 2) / (high - low)[0]
    return normalised_V3


def add_rings(
    vertices_V3: Floats, uv_V2: Floats, triangles_T3: Ints, outline: list[int]
) -> tuple[Floats, Floats, Floats, Ints]:
    """Vertices, texture coordinates, opacities (V,) and triangles, with the rings."""
    n = len(vertices_V3)
    vertices, uv, opacity, triangles = [vertices_V3], [uv_V2], [np.ones(n)], [triangles_T3]
    inner = np.array(outline)
    face_uv = uv_V2[outline]
    for ring, (scale, depth, alpha) in enumerate(RINGS):
        outer = n + ring * len(outline) + np.arange(len(outline))
        vertices.append(vertices_V3[outline] * (scale, scale, 1) + (0, 0, depth))
        uv.append(face_uv.mean(0) + scale * (face_uv - face_uv.mean(0)))
        opacity.append(np.full(len(outline), alpha))
        a, b, c, d = inner, np.roll(inner, -1), outer, np.roll(outer, -1)
        triangles += [np.stack([a, b, c], axis=1), np.stack([b, d, c], axis=1)]
        inner = outer
    return (
        np.concatenate(vertices),
        np.concatenate(uv),
        np.concatenate(opacity),
        np.concatenate(triangles),
    )


def turned_outwards(triangles_T3: Ints, vertices_V3: Floats) -> Ints:
    """The same triangles, all in the order of vertices whose normal looks out of the face."""
    apexes = apexes_of(triangles_T3)
    left = {tuple(sorted(t)) for t in triangles_T3.tolist()}
    steps, turned = [tuple(triangles_T3[0].tolist())], []
    while steps:
        a, b, c = steps.pop()
        if tuple(sorted((a, b, c))) not in left:
            continue
        left.remove(tuple(sorted((a, b, c))))
        turned.append((a, b, c))
        # A neighbour goes along the common edge in the other direction.
        for d, e in ((a, b), (b, c), (c, a)):
            steps += [(e, d, f) for f in apexes[min(d, e), max(d, e)] if f not in (a, b, c)]
    found = np.array(turned)
    a_T3, b_T3, c_T3 = (vertices_V3[found[:, i]] for i in range(3))
    normal = np.cross(b_T3 - a_T3, c_T3 - a_T3).sum(0)
    return found[:, ::-1] if normal[2] > 0 else found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
