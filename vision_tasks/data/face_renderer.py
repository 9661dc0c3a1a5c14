"""
Renders faces with exact landmarks: a textured mesh under random identity, mimic, pose and light.

Mesh and texture were made by ``make_face_mesh.py``. A face is a sum of the mesh and of smooth
displacements around named places of it, such as a wider mouth, each times a random number. Colours
of skin, hair, lips and brows, light, background, things in front of the face, blur and noise are
random, too. Everything follows from a seed and the face's index.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

# Shape letters: V vertices, T triangles, P landmarks, M displacements, H W image, N any rows.
Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bytes = NDArray[np.uint8]

FOLDER = Path(__file__).resolve().parent / "face"
#: The mesh's vertices where the iBUG scheme (300-W) has its 68 points, in its order.
LANDMARKS = (
    *(162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389),  # jaw
    *(71, 63, 105, 66, 107, 336, 296, 334, 293, 301),  # brows
    *(168, 197, 5, 4, 75, 97, 2, 326, 305),  # nose
    *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),  # eyes
    *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181),  # outer lips
    *(78, 82, 13, 312, 308, 317, 14, 87),  # inner lips
)
#: The mesh's own vertices; those after them are the rings of hair and neck around the face.
N_FACE_VERTICES = 468
#: Pixels of the rendered picture for each of the image's, in both directions.
SUPERSAMPLING = 2
#: Distance of the camera, in widths of the face.
CAMERA = 5.0


class Mesh(NamedTuple):
    """The face at rest, 1 wide: x to the right, y down, z away from the camera."""

    vertices_V3: Floats
    uv_V2: Floats
    opacity_V: Floats
    triangles_T3: Ints
    texture_HW3: Floats


class Surface(NamedTuple):
    """What is seen at the picture's covered pixels: three vertices of each, and their shares."""

    pixels_N: Ints
    vertices_N3: Ints
    shares_3N: Floats


def render_face(index: int, size: int, seed: int = 0) -> tuple[Bytes, Floats]:
    """
    A random face and its landmarks.

    :param index: of the face, which is the same at each call
    :param size: side of the image, in pixels
    :param seed: of all faces
    :return: the image, uint8 (3, size, size), and the points (68, 2), x first, in 0..1 of its sides
    """
    random = np.random.default_rng([seed, index])
    mesh = load_mesh()
    shape_V3 = mesh.vertices_V3 + random_displacement(random)
    turned_V3 = shape_V3 @ random_rotation(random).T
    normals_V3 = vertex_normals(turned_V3, mesh.triangles_T3)
    seen_V3 = place(project(turned_V3), random)
    side = size * SUPERSAMPLING
    surface = rasterise(seen_V3 * np.float32(side), mesh.triangles_T3, side)
    colours_V3 = random_colours(random) * random_light(normals_V3, random)
    picture_HW3 = random_background(side, random)
    paint(picture_HW3, surface, mesh, colours_V3)
    cover(picture_HW3, random)
    image_3HW = finish(picture_HW3, size, random)
    return image_3HW, seen_V3[list(LANDMARKS), :2]


@functools.cache
def load_mesh() -> Mesh:
    """The mesh that ships with hubrl."""
    arrays = load_file(FOLDER / "mesh.safetensors")
    with Image.open(FOLDER / "texture.png") as file:
        texture_HW3 = np.asarray(file, dtype=np.float32) / 255
    return Mesh(
        vertices_V3=arrays["vertices"],
        uv_V2=arrays["uv"],
        opacity_V=arrays["opacity"],
        triangles_T3=arrays["triangles"].astype(np.int32),
        texture_HW3=texture_HW3,
    )


def random_displacement(random: np.random.Generator) -> Floats:
    """How a random face's vertices (V, 3) differ from those of the face at rest."""
    identity_M33, mimic_M33 = displacements()
    identity_M = random.normal(0, 1, len(identity_M33)).clip(-2, 2).astype(np.float32)
    # The face at rest smiles; a mouth may open, eyes may close and brows may rise.
    mimic_M = random.beta(1.0, 2.0, len(mimic_M33)).astype(np.float32)
    moved: Floats = np.tensordot(identity_M, identity_M33, 1) + np.tensordot(mimic_M, mimic_M33, 1)
    return moved


@functools.cache
def displacements() -> tuple[Floats, Floats]:
    """
    Displacement fields, (M, V, 3): of identities, for a normal number, and of mimics, for 0..1.

    Each scales or moves what lies around a place of the face, with a Gaussian decline.
    """
    vertices_V3 = load_mesh().vertices_V3

    def at(*vertices: int) -> Floats:
        centre: Floats = vertices_V3[list(vertices)].mean(0)
        return centre

    def near(centre_3: Floats, *radii: float) -> Floats:
        offsets_V2 = (vertices_V3 - centre_3)[:, :2] / np.array(radii, dtype=np.float32)
        weights: Floats = np.exp(-0.5 * (offsets_V2**2).sum(1, keepdims=True))
        return weights

    def scale(centre_3: Floats, radius: float, *factors: float) -> Floats:
        sizes: Floats = (vertices_V3 - centre_3) * np.array(factors, dtype=np.float32)
        return near(centre_3, radius, radius) * sizes

    def move(centre_3: Floats, radii: tuple[float, float], *by: float) -> Floats:
        return near(centre_3, *radii) * np.array(by, dtype=np.float32)

    eyes, brows, corners = (at(33, 133), at(263, 362)), (at(105), at(334)), (at(61), at(291))
    mouth, nose, chin, cheeks = at(13, 14), at(4), at(152), (at(50), at(280))
    middle = np.zeros(3, dtype=np.float32)
    # What is below the mouth's opening moves with the jaw.
    is_below_V1 = (vertices_V3[:, 1:2] > mouth[1]).astype(np.float32)
    lower_lids = [move(at(lid), (0.07, 0.03), 0, -0.012, 0) for lid in (145, 374)]
    upper_lids = [move(at(lid), (0.08, 0.03), 0, 0.045, 0) for lid in (159, 386)]
    identity = [
        scale(middle, 9, 0.05, 0, 0),
        scale(middle, 9, 0, 0.05, 0),
        scale(middle, 9, 0, 0, 0.15),
        scale(chin, 0.35, 0.10, 0, 0),
        move(chin, (0.25, 0.15), 0, 0.03, 0),
        scale(at(10), 0.3, 0.04, 0.08, 0),
        move(eyes[0], (0.15, 0.12), -0.015, 0, 0) + move(eyes[1], (0.15, 0.12), 0.015, 0, 0),
        move(eyes[0], (0.15, 0.12), 0, 0.012, 0) + move(eyes[1], (0.15, 0.12), 0, 0.012, 0),
        scale(eyes[0], 0.12, 0.06, 0.12, 0) + scale(eyes[1], 0.12, 0.06, 0.12, 0),
        move(brows[0], (0.2, 0.06), 0, -0.012, 0) + move(brows[1], (0.2, 0.06), 0, -0.012, 0),
        scale(nose, 0.12, 0.14, 0, 0),
        move(nose, (0.08, 0.12), 0, 0.02, -0.03),
        scale(mouth, 0.18, 0.10, 0, 0),
        scale(mouth, 0.14, 0, 0.12, 0.05),
        move(mouth, (0.2, 0.12), 0, 0.015, 0),
        move(cheeks[0], (0.15, 0.15), -0.02, 0, -0.02)
        + move(cheeks[1], (0.15, 0.15), 0.02, 0, -0.02),
        # No face is symmetric.
        move(mouth, (0.2, 0.12), 0.008, 0, 0),
        move(corners[0], (0.1, 0.1), 0, -0.008, 0) - move(corners[1], (0.1, 0.1), 0, -0.008, 0),
    ]
    mimic = [
        is_below_V1 * move(chin, (0.4, 0.35), 0, 0.16, 0.02),
        move(corners[0], (0.1, 0.08), 0.05, 0.045, 0)
        + move(corners[1], (0.1, 0.08), -0.05, 0.045, 0),
        sum(upper_lids) + sum(lower_lids),
        move(brows[0], (0.2, 0.08), 0, -0.05, 0) + move(brows[1], (0.2, 0.08), 0, -0.05, 0),
    ]
    return np.stack(identity).astype(np.float32), np.stack(mimic).astype(np.float32)


def random_rotation(random: np.random.Generator) -> Floats:
    """(3, 3): nodding, turning up to 45 degrees to either side, and leaning."""
    nod, turn, lean = np.radians(random.normal(0, (11, 20, 12)).clip((-25, -45, -30), (25, 45, 30)))
    return (_rotation(lean, 0, 1) @ _rotation(nod, 1, 2) @ _rotation(turn, 0, 2)).astype(np.float32)


def vertex_normals(vertices_V3: Floats, triangles_T3: Ints) -> Floats:
    """Unit normals (V, 3) that look out of the face, means over the triangles at each vertex."""
    a_T3, b_T3, c_T3 = (vertices_V3[triangles_T3[:, i]] for i in range(3))
    normals_T3 = np.cross(b_T3 - a_T3, c_T3 - a_T3)
    normals_V3 = np.zeros_like(vertices_V3)
    for i in range(3):
        np.add.at(normals_V3, triangles_T3[:, i], normals_T3)
    lengths_V1 = np.linalg.norm(normals_V3, axis=1, keepdims=True)
    unit: Floats = normals_V3 / np.maximum(lengths_V1, 1e-9)
    return unit


def project(vertices_V3: Floats) -> Floats:
    """As the camera sees them: nearer ones larger; z stays."""
    depths_V1 = CAMERA + vertices_V3[:, 2:]
    seen: Floats = np.concatenate([vertices_V3[:, :2] * CAMERA / depths_V1, depths_V1], axis=1)
    return seen


def place(vertices_V3: Floats, random: np.random.Generator) -> Floats:
    """Moved and scaled so that all landmarks lie in the image, whose sides are 0..1."""
    points_P2 = vertices_V3[list(LANDMARKS), :2]
    low, high = points_P2.min(0), points_P2.max(0)
    share = random.uniform(0.5, 0.75)
    scale = share / (high - low).max()
    free = np.maximum(0, 1 - (high - low) * scale) / 2 - 0.02
    centre = 0.5 + random.uniform(-0.6, 0.6, 2) * free
    placed_V3 = vertices_V3.copy()
    placed_V3[:, :2] = (vertices_V3[:, :2] - (low + high) / 2) * scale + centre
    return placed_V3


def rasterise(vertices_V3: Floats, triangles_T3: Ints, side: int) -> Surface:
    """The nearest triangle at each pixel that one covers; ``vertices_V3`` in pixels."""
    corners_T33 = vertices_V3[triangles_T3]
    triangles_N, x_N, y_N = _candidates(corners_T33[:, :, :2], side)
    shares_3N = _barycentric(corners_T33[:, :, :2], triangles_N, x_N, y_N)
    inside_N = np.flatnonzero((shares_3N[0] >= 0) & (shares_3N[1] >= 0) & (shares_3N[2] >= 0))
    triangles_N, shares_3N = triangles_N[inside_N], shares_3N[:, inside_N]
    pixels_N = y_N[inside_N] * side + x_N[inside_N]
    depths_N = sum(shares_3N[i] * corners_T33[triangles_N, i, 2] for i in range(3))
    nearest = np.full(side * side, np.inf, dtype=np.float32)
    np.minimum.at(nearest, pixels_N, depths_N)
    seen_N = np.flatnonzero(depths_N == nearest[pixels_N])
    return Surface(pixels_N[seen_N], triangles_T3[triangles_N[seen_N]], shares_3N[:, seen_N])


def random_colours(random: np.random.Generator) -> Floats:
    """(V, 3): what the texture's colours are multiplied by at each vertex, for skin and hair."""
    vertices_V3 = load_mesh().vertices_V3
    skin = random.uniform(0.45, 1.2) * (1 + random.normal(0, 0.06, 3))
    hair = random.uniform(0.15, 1.3) * (1 + random.normal(0, 0.15, 3))
    lips = 1 + random.uniform(-0.2, 0.35) * np.array([0.6, -0.8, -0.4])
    brows = random.uniform(0.45, 1.0)
    beard = random.uniform(0.3, 0.8) if random.random() < 0.25 else 1.0
    colours_V3 = np.broadcast_to(skin, vertices_V3.shape).copy()
    colours_V3[N_FACE_VERTICES:] = hair
    # The ring goes through hair above the eyes and at their height; below is the neck.
    is_neck_V = vertices_V3[:, 1] > 0.25
    is_neck_V[:N_FACE_VERTICES] = False
    colours_V3[is_neck_V] = skin * 0.85
    masks = masks_of_regions()
    for region, factor in (("lips", lips), ("brows", brows), ("beard", beard)):
        colours_V3 *= 1 + masks[region][:, None] * (factor - 1)
    return colours_V3.astype(np.float32)


@functools.cache
def masks_of_regions() -> dict[str, Floats]:
    """Whether each vertex belongs to the lips, the brows or where a beard grows: (V,), 0 or 1."""
    points = {
        "lips": [61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181],
        "brows": [
            *(70, 63, 105, 66, 107, 46, 53, 52, 65, 55),
            *(336, 296, 334, 293, 300, 285, 295, 282, 283, 276),
        ],
        "beard": [
            *(172, 136, 150, 149, 176, 148, 152, 377, 400, 378, 379, 365, 397, 175, 171, 396),
            *(199, 208, 428, 32, 262, 164, 165, 391, 92, 322, 212, 432),
        ],
    }
    vertices_V = np.arange(len(load_mesh().vertices_V3))
    return {name: np.isin(vertices_V, found).astype(np.float32) for name, found in points.items()}


def random_light(normals_V3: Floats, random: np.random.Generator) -> Floats:
    """(V, 3): light near white from somewhere before the face, and from all sides."""
    direction = np.array([random.normal(0, 0.8), random.normal(-0.4, 0.6), -1.0])
    direction /= np.linalg.norm(direction)
    ambient = random.uniform(0.45, 0.9)
    lit_V1 = np.maximum(0, normals_V3 @ direction)[:, None]
    tint = 1 + random.normal(0, 0.06, 3)
    light_V3: Floats = (ambient + (1.25 - ambient) * lit_V1) * tint
    return light_V3.astype(np.float32)


def random_background(side: int, random: np.random.Generator) -> Floats:
    """(side, side, 3): soft spots of random colours, at one to sixteen scales."""
    cells = int(random.integers(2, 17))
    noise = random.uniform(0, 1, (cells, cells, 3))
    mean = random.uniform(0, 1, 3)
    coarse = Image.fromarray(_bytes(mean + random.uniform(0.1, 0.8) * (noise - 0.5)))
    smooth = coarse.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) / 255


def paint(picture_HW3: Floats, surface: Surface, mesh: Mesh, colours_V3: Floats) -> None:
    """Put the textured surface into the picture."""
    values_V6 = np.concatenate([mesh.uv_V2, colours_V3, mesh.opacity_V[:, None]], axis=1)
    values_N6 = sum(
        values_V6[surface.vertices_N3[:, i]] * surface.shares_3N[i][:, None] for i in range(3)
    )
    seen_N3 = _sample(mesh.texture_HW3, values_N6[:, :2]) * values_N6[:, 2:5]
    pixels_N3 = picture_HW3.reshape(-1, 3)
    behind_N3 = pixels_N3[surface.pixels_N]
    pixels_N3[surface.pixels_N] = behind_N3 + values_N6[:, 5:] * (seen_N3 - behind_N3)


def cover(picture_HW3: Floats, random: np.random.Generator) -> None:
    """In a quarter of the pictures something of one colour is in front of a part of the face."""
    is_covered = random.random() < 0.25
    centre, radii = random.uniform(0.1, 0.9, 2), random.uniform(0.05, 0.2, 2)
    colour, power = random.uniform(0, 1, 3), random.choice((2, 20))
    if is_covered:
        side = len(picture_HW3)
        x = (np.arange(side) + 0.5) / side
        offsets_HW = (np.abs((x[:, None] - centre[1]) / radii[1]) ** power) + (
            np.abs((x[None] - centre[0]) / radii[0]) ** power
        )
        picture_HW3[offsets_HW < 1] = colour


def finish(picture_HW3: Floats, size: int, random: np.random.Generator) -> Bytes:
    """The image, uint8 (3, size, size): smaller, with contrast, blur and noise of a camera."""
    scale = len(picture_HW3) // size
    image_HW3 = picture_HW3.reshape(size, scale, size, scale, 3).mean((1, 3))
    image_HW3 = np.maximum(image_HW3, 0) ** random.uniform(0.75, 1.3) * random.uniform(0.8, 1.15)
    blurred = int(size / random.uniform(1, 2.5))
    small = Image.fromarray(_bytes(image_HW3)).resize((blurred, blurred), Image.Resampling.BILINEAR)
    image_HW3 = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    noise_HW3 = random.normal(0, random.uniform(0, 8), image_HW3.shape)
    image: Bytes = (image_HW3 + noise_HW3).clip(0, 255).round().astype(np.uint8).transpose(2, 0, 1)
    return np.ascontiguousarray(image)


def _rotation(angle: float, i: int, j: int) -> NDArray[np.float64]:
    matrix = np.eye(3)
    matrix[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return matrix


def _candidates(corners_T32: Floats, side: int) -> tuple[Ints, Ints, Ints]:
    """Triangle, column and row of each pixel in each triangle's bounding box."""
    low_T2 = np.ceil(corners_T32.min(1) - 0.5).clip(0, side).astype(np.int32)
    high_T2 = np.ceil(corners_T32.max(1) - 0.5).clip(0, side).astype(np.int32)
    widths_T, heights_T = (high_T2 - low_T2).T
    counts_T = widths_T * heights_T
    triangles_N = np.repeat(np.arange(len(corners_T32), dtype=np.int32), counts_T)
    starts_T = np.cumsum(counts_T, dtype=np.int32) - counts_T
    places_N = np.arange(len(triangles_N), dtype=np.int32) - starts_T[triangles_N]
    widths_N = widths_T[triangles_N]
    rows_N = places_N // widths_N
    columns_N = places_N - rows_N * widths_N
    return triangles_N, columns_N + low_T2[triangles_N, 0], rows_N + low_T2[triangles_N, 1]


def _barycentric(corners_T32: Floats, triangles_N: Ints, x_N: Ints, y_N: Ints) -> Floats:
    """Shares (3, N) of a triangle's corners at each pixel's centre; negative outside of it."""
    a_T2, b_T2, c_T2 = (corners_T32[:, i] for i in range(3))
    ab_T2, ac_T2 = b_T2 - a_T2, c_T2 - a_T2
    areas_T = ab_T2[:, 0] * ac_T2[:, 1] - ab_T2[:, 1] * ac_T2[:, 0]
    # A triangle that is seen from its edge covers nothing.
    areas_T = np.where(np.abs(areas_T) < 1e-6, np.float32(np.inf), areas_T)
    # How fast the second and the third corner's shares grow to the right and downwards.
    slopes_4T = np.stack([ac_T2[:, 1], -ac_T2[:, 0], -ab_T2[:, 1], ab_T2[:, 0]]) / areas_T
    slopes_4N, a_N2 = slopes_4T.astype(np.float32)[:, triangles_N], a_T2[triangles_N]
    half = np.float32(0.5)
    dx_N, dy_N = x_N + half - a_N2[:, 0], y_N + half - a_N2[:, 1]
    shares_3N = np.empty((3, len(dx_N)), dtype=np.float32)
    shares_3N[1] = dx_N * slopes_4N[0] + dy_N * slopes_4N[1]
    shares_3N[2] = dx_N * slopes_4N[2] + dy_N * slopes_4N[3]
    shares_3N[0] = 1 - shares_3N[1] - shares_3N[2]
    return shares_3N


def _sample(texture_HW3: Floats, uv_N2: Floats) -> Floats:
    """Bilinear colours (N, 3) at points in pixels, the first of which has its centre at 0.5."""
    height, width = texture_HW3.shape[:2]
    x_N = (uv_N2[:, 0] - np.float32(0.5)).clip(0, np.float32(width - 1.001))
    y_N = (uv_N2[:, 1] - np.float32(0.5)).clip(0, np.float32(height - 1.001))
    left_N, top_N = x_N.astype(np.int32), y_N.astype(np.int32)
    across_N1, down_N1 = (x_N - left_N)[:, None], (y_N - top_N)[:, None]
    texels = texture_HW3.reshape(-1, 3)
    first_N = top_N * width + left_N
    above = texels[first_N] * (1 - across_N1) + texels[first_N + 1] * across_N1
    first_N += width
    below = texels[first_N] * (1 - across_N1) + texels[first_N + 1] * across_N1
    colours: Floats = above * (1 - down_N1) + below * down_N1
    return colours


def _bytes(colours: NDArray[np.float64] | Floats) -> Bytes:
    return (colours * 255).clip(0, 255).round().astype(np.uint8)
