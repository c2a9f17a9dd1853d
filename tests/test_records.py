"""Named tuples of our own: what callers count on of those in typing."""

from __future__ import annotations

import copy
import pickle

import pytest

from overlayfs_py.records import NamedTuple


class Point(NamedTuple):
    """A point."""

    x: int
    y: int = 2
    name: str = "p"

    def sum(self) -> int:
        return self.x + self.y


def test_fields_are_given_by_place_and_by_name_and_have_defaults() -> None:
    assert Point(1) == (1, 2, "p")
    assert Point(1, y=5, name="q") == (1, 5, "q")
    assert (Point(3).x, Point(3, 4).y, Point(3).name, Point(3).sum()) == (3, 4, "p", 5)


def test_a_wrong_number_or_name_of_fields_is_an_error() -> None:
    for values, named in (((), {}), ((1, 2, "a", 4), {}), ((1,), {"z": 1})):
        with pytest.raises(TypeError):
            Point(*values, **named)  # type: ignore[arg-type]


def test_a_changed_copy_leaves_the_rest() -> None:
    point = Point(1)
    assert point._replace(y=7) == (1, 7, "p")
    assert point == (1, 2, "p")
    with pytest.raises(TypeError):
        point._replace(z=1)  # type: ignore[call-arg]


def test_records_cannot_be_changed_and_have_no_room_for_more() -> None:
    point = Point(1)
    with pytest.raises(AttributeError):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        point.z = 2  # type: ignore[attr-defined]


def test_records_are_shown_copied_pickled_and_matched() -> None:
    point = Point(1)
    assert repr(point) == "Point(x=1, y=2, name='p')"
    assert copy.copy(point) == point
    found = pickle.loads(pickle.dumps(point))
    assert (type(found), found) == (Point, point)
    match point:
        case Point(x, y, name):
            assert (x, y, name) == point
