"""Where names are written on objects."""

import numpy as np
import pytest

from raypipe.pictures import names


def slow(part: np.ndarray) -> tuple[int, int]:
    """The (y, x) of a part that is farthest from all that is not, the border included; the first in raster order."""
    outside = np.argwhere(~np.pad(part, 1)) - 1
    inside = np.argwhere(part)
    distances = np.sqrt(((inside[:, None] - outside[None]) ** 2).sum(axis=2)).min(axis=1)
    return tuple(inside[np.flatnonzero(distances >= distances.max() - 1e-4)[0]])


def test_a_name_stands_at_the_innermost_point_of_the_largest_part():
    mask = np.zeros((60, 90), bool)
    mask[20:29, 10:80] = mask[29:50, 60:80] = True  # an L whose corner is thick
    part = mask.copy()
    mask[2:15, 3:40] = True  # a smaller part
    (name,) = names.written([("a", mask)], 4)
    assert (int(name.y), int(name.x)) == slow(part) and name.text == "a" and mask[int(name.y), int(name.x)]


def test_names_stay_within_the_picture_and_what_has_no_pixel_has_none():
    whole, corner = np.ones((30, 200), bool), np.zeros((30, 200), bool)
    corner[:6, :6] = True
    line = names.height((30, 200))
    first, second = names.written([("all", whole), ("nothing", whole & False), ("upper left corner", corner)], line)
    assert (first.text, first.mask, second.mask) == ("all", 0, 2) and 14 <= first.y <= 16
    assert second.x == names.ADVANCE * line * len("upper left corner") / 2 and second.y < 6
    (long,) = names.written([("x" * 400, corner)], line)
    assert long.x == pytest.approx(100, abs=3) and long.text.rstrip("x") == long.text and long.text.strip("x") == "…"
    assert names.ADVANCE * line * len(long.text) <= 200 < names.ADVANCE * line * (len(long.text) + 1)


def test_names_stand_beside_one_another_and_what_is_written_elsewhere_gives_way():
    left = np.zeros((40, 90), bool)
    left[:, :45] = True
    middle = ~left
    middle[:, 60:] = False
    one, other = names.written([("abcdefgh", left), ("ijklmnop", middle)], 6)
    assert left[int(one.y), int(one.x)] and middle[int(other.y), int(other.x)]
    assert abs(one.y - other.y) >= 6  # side by side they would touch
    small = np.zeros((40, 90), bool)
    small[int(one.y) + 2 : int(one.y) + 4, int(one.x) : int(one.x) + 2] = True
    assert names.written([("abcdefgh", small), ("abcdefgh", left), ("", middle)], 6) == [one._replace(mask=1)]
    crowded = names.written([("abcdefgh", left), ("q", small)], 60)
    assert [name.text for name in crowded] == ["a…", "q"]  # without any room each name is there once
    assert names.height((480, 320), 20) < names.height((480, 320), 3)


def test_colours_come_again_after_the_last_one():
    found = names.colours(["b", "a", "b", *map(str, range(6))])
    assert list(found.items())[:3] == [("b", 0), ("a", 1), ("0", 2)] and found["5"] == 0
