"""
Which images are learned from, which a model is chosen by, and which it is tested on.

All rules but ``limited`` are fixed: they follow from the order of the images of each class alone,
so that every seed and limit has the same validation and test images.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# Shape letters: N images.
Ints = NDArray[np.int64]

#: Validation takes one of so many training images, or fewer of a large set: at most
#: about ``MAX_VALIDATION``.
VALIDATION_STEP, MAX_VALIDATION = 10, 1000


def held_out(classes_N: Ints) -> tuple[Ints, Ints]:
    """
    Rows of training and of validation: the first of every ten images of each class is held out.

    Where more than about 1,000 images would be, it's the first of every so many that 1,000 are.

    :param classes_N: class of each training image; equal numbers where there are no classes
    """
    step = max(VALIDATION_STEP, math.ceil(len(classes_N) / MAX_VALIDATION))
    is_held_out_N = places_in_classes(classes_N) % step == 0
    return np.flatnonzero(~is_held_out_N), np.flatnonzero(is_held_out_N)


def three_parts(classes_N: Ints) -> tuple[Ints, Ints, Ints]:
    """
    Rows of training, validation and test, 60, 20 and 20 %, where no split is official.

    Of every five images of a class, the first is for the test and the second for validation.

    :param classes_N: class of each image
    """
    places_N = places_in_classes(classes_N) % 5
    return np.flatnonzero(places_N > 1), np.flatnonzero(places_N == 1), np.flatnonzero(places_N < 1)


def limited(classes_N: Ints, limit: int, seed: int) -> Ints:
    """
    At most ``limit`` rows, as many of each class as the classes have, in increasing order.

    A smaller limit takes some of the rows of a larger one.

    :param classes_N: class of each image; equal numbers where there are no classes
    :param limit: at least one for each class
    :param seed: of the draw
    :raises ValueError: if the limit is smaller than the number of classes
    """
    n_classes = len(np.unique(classes_N))
    if limit < n_classes:
        raise ValueError(
            f"limit is {limit}, but there are {n_classes} classes: let it be at least {n_classes}"
        )
    order_N = np.random.default_rng(seed).permutation(len(classes_N))
    places_N = places_in_classes(classes_N[order_N])
    drawn = order_N[np.argsort(places_N, kind="stable")[:limit]]
    return np.sort(drawn)


def places_in_classes(classes_N: Ints) -> Ints:
    """How many images of its class lie before each one, (N,)."""
    order_N = np.argsort(classes_N, kind="stable")
    counts = np.unique(classes_N, return_counts=True)[1]
    starts_N = np.repeat(np.cumsum(counts) - counts, counts)
    places_N = np.empty_like(order_N)
    places_N[order_N] = np.arange(len(classes_N)) - starts_N
    return places_N
