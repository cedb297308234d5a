"""Where names are written on objects."""

import numpy as np

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
    (name,) = names.written({"a": mask})
    assert (int(name.y), int(name.x)) == slow(part) and name.text == "a" and mask[int(name.y), int(name.x)]


def test_names_stay_within_the_picture_and_what_has_no_pixel_has_none():
    whole, corner = np.ones((30, 200), bool), np.zeros((30, 200), bool)
    corner[:6, :6] = True
    first, second = names.written({"all": whole, "nothing": whole & False, "upper left corner": corner})
    assert first.text == "all" and 14 <= first.y <= 16
    width = names.ADVANCE * names.height((30, 200)) * len("upper left corner")
    assert second.x == width / 2 and second.y < 6
    (long,) = names.written({"x" * 400: corner})
    assert long.x == 100


def test_colours_come_again_after_the_last_one():
    found = names.colours(["b", "a", "b", *map(str, range(6))])
    assert list(found.items())[:3] == [("b", 0), ("a", 1), ("0", 2)] and found["5"] == 0
