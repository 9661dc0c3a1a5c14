"""Splits are fixed and stratified; limits are drawn by a seed."""

from __future__ import annotations

import numpy as np
import pytest

from vision_tasks.data.splits import held_out, limited, places_in_classes, three_parts

CLASSES = np.array([0, 1, 0, 1, 1, 0, 2, 0, 2, 2, 2, 2])


def test_places_count_within_each_class() -> None:
    assert places_in_classes(CLASSES).tolist() == [0, 0, 1, 1, 2, 2, 0, 3, 1, 2, 3, 4]


def test_the_first_of_ten_of_each_class_is_held_out() -> None:
    classes = np.repeat([0, 1, 2], [20, 11, 2])
    rows, held = held_out(classes)
    assert held.tolist() == [0, 10, 20, 30, 31]
    assert sorted([*rows, *held]) == list(range(33))


def test_a_large_set_holds_out_about_a_thousand() -> None:
    rows, held = held_out(np.tile(np.arange(10), 6000))
    assert len(held) == 1000
    assert len(rows) == 59_000
    assert np.bincount(held % 10).tolist() == [100] * 10


def test_without_official_split_a_fifth_is_for_validation_and_one_for_the_test() -> None:
    rows, validation, test = three_parts(np.repeat([0, 1], [10, 3]))
    assert test.tolist() == [0, 5, 10]
    assert validation.tolist() == [1, 6, 11]
    assert sorted([*rows, *validation, *test]) == list(range(13))


def test_a_limit_takes_as_many_of_each_class_as_there_are() -> None:
    classes = np.repeat([0, 1, 2], [50, 50, 3])
    drawn = limited(classes, 23, seed=0)
    assert np.bincount(classes[drawn]).tolist() == [10, 10, 3]
    assert (np.diff(drawn) > 0).all()
    assert set(limited(classes, 12, seed=0)) < set(drawn)


def test_a_limit_is_drawn_by_the_seed() -> None:
    classes = np.repeat([0, 1], 100)
    assert limited(classes, 20, seed=1).tolist() == limited(classes, 20, seed=1).tolist()
    assert limited(classes, 20, seed=1).tolist() != limited(classes, 20, seed=2).tolist()
    assert limited(classes, 500, seed=1).tolist() == list(range(200))


def test_a_limit_below_the_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="limit is 2, but there are 3 classes"):
        limited(CLASSES, 2, seed=0)
