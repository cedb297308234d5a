"""The grammar of --over, and what is drawn from it."""

import re

import numpy as np
import pytest

from raypipe.refiners.guided import Guided
from raypipe.segmenters.kmeans import Kmeans
from raypipe.sweep.search import Interval, canonical, draw, grid, lines, parse

KINDS = [Kmeans, Guided]


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ("k=2,3,5", [2, 3, 5]),
        ("k=5,2,5,2", [5, 2]),
        ("k=2:6:2,3", [2, 4, 6, 3]),
        ("threshold=0.2:0.8:0.1", [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
        ("threshold=0.5,0.50:0.56:0.01", [0.5, 0.51, 0.52, 0.53, 0.54, 0.55, 0.56]),
        ("k=2:5", [2, 3, 4, 5]),
        ("threshold=None,0", [None, 0.0]),
        ("threshold=none,0", [None, 0.0]),
        ("threshold=0.9:0.1:-0.4", [0.9, 0.5, 0.1]),
        ("eps=1,1e-3", [1.0, 0.001]),
        ("refine-guide=mean, rgb", ["mean", "rgb"]),
        ("refine_working_size=None,64", [None, 64]),
        ("foreground=rembg:u2netp,given:/a/b,64", ["rembg:u2netp", "given:/a/b", "64"]),
    ],
)
def test_values_and_ranges_are_read_as_the_field_takes_them(entry, values):
    (found,) = parse([entry], KINDS).values()
    assert found == values and [type(one) for one in found] == [type(one) for one in values]


def test_lists_are_written_with_plus():
    from dataclasses import dataclass

    @dataclass
    class Sizes:
        sizes: tuple[int, ...] = (4,)
        scales: tuple[float, ...] = (1.0,)

    space = parse(["sizes=4+8+16,4,32+64", "scales=0.5+1e-1,2"], [Sizes])
    assert space == {"sizes": [(4, 8, 16), (4,), (32, 64)], "scales": [(0.5, 0.1), (2.0,)]}


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ([], "--over must name at least one field"),
        (["k"], "--over 'k': expected NAME=VALUES"),
        (["k="], "--over 'k=': expected NAME=VALUES"),
        (["k=2,,3"], "option 'k': expected a whole number, got ''"),
        (["kk=2"], "unknown option 'kk' (value '2'); did you mean 'k'?"),
        (["input=a"], "unknown option 'input'"),
        (["k=2.5"], "option 'k': expected a whole number, got '2.5'"),
        (["k=2..3.5"], "option 'k': expected a whole number, got '3.5'"),
        (["refine_guide=red"], "option 'refine_guide': expected one of 'mean', 'luma', 'rgb', got 'red'"),
        (["k=2", "k=3"], "--over names 'k' twice"),
        (["eps=0:2"], "--over eps: the range '0:2' lacks its step; write start:stop:step"),
        (["k=5:2"], "--over k: the range '5:2:1' is empty"),
        (["k=5:2:1"], "--over k: the range '5:2:1' is empty"),
        (["k=2:5:0"], "--over k: the range '2:5:0' is empty"),
        (["eps=0:1:1e-9"], "--over eps: the range '0:1:1e-9' has 1,000,000,001 values"),
        (["eps=2..2"], "--over eps: the interval '2..2' is empty"),
        (["eps=log:0..1"], "--over eps: a logarithmic interval must begin above 0"),
    ],
)
def test_what_cannot_be_swept_is_named(over, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        parse(over, KINDS)


def test_lines_vary_one_field_after_the_other_and_meet_where_both_are_as_given():
    settings = lines({"k": [2, 3], "eps": [1.0, 0.5]}, {"k": 3, "eps": 1.0})
    assert settings == [{"k": 2, "eps": 1.0}, {"k": 3, "eps": 1.0}, {"k": 3, "eps": 0.5}]


def test_a_refiners_field_needs_the_refiner():
    with pytest.raises(TypeError, match="'refine_radius' .* has no effect without a refiner; set refine to 'guided'"):
        parse(["refine_radius=4"], [Kmeans])


def test_a_grid_is_every_combination_and_takes_no_interval():
    settings = grid({"k": [2, 3], "threshold": [0.4, 0.5]})
    assert settings == [
        {"k": 2, "threshold": 0.4},
        {"k": 2, "threshold": 0.5},
        {"k": 3, "threshold": 0.4},
        {"k": 3, "threshold": 0.5},
    ]
    with pytest.raises(ValueError, match="--over eps: an interval has no grid"):
        grid(parse(["eps=1..2"], KINDS))
    with pytest.raises(ValueError, match="1,002,001 settings are too many"):
        grid({"a": list(range(1001)), "b": list(range(1001))})


def test_draws_are_different_repeatable_and_begin_alike():
    space = parse(["k=2..9", "eps=log:1e-3..10", "threshold=0.3,0.5"], KINDS)
    few, many = (draw(space, free={"threshold"}, trials=n, seed=3) for n in (4, 9))
    assert len(few) == 8 and many[:8] == few and len({canonical(one) for one in many}) == 18
    assert draw(space, free={"threshold"}, trials=4, seed=4) != few
    assert all(type(one["k"]) is int and 2 <= one["k"] <= 9 and 1e-3 <= one["eps"] <= 10 for one in many)
    assert {one["threshold"] for one in many} == {0.3, 0.5}


def test_draws_of_few_values_end_when_all_were_drawn():
    found = draw({"k": [2, 3, 4]}, free=(), trials=50, seed=0)
    assert sorted(one["k"] for one in found) == [2, 3, 4]


def test_intervals_reach_both_ends_and_logarithmic_ones_every_decade():
    rng = np.random.default_rng(0)
    whole = Interval(2, 4, is_log=False, is_whole=True)
    assert {whole.draw(rng) for _ in range(100)} == {2, 3, 4}
    wide = [Interval(1e-4, 1, is_log=True, is_whole=False).draw(rng) for _ in range(1000)]
    assert 200 < sum(value < 1e-3 for value in wide) < 300


def test_a_draw_needs_something_to_draw():
    with pytest.raises(ValueError, match="nothing to draw.*use --search grid"):
        draw({"threshold": [0.4, 0.5]}, free={"threshold"}, trials=3, seed=0)
    drawn = draw(parse(["threshold=0.2..0.8"], KINDS), free={"threshold"}, trials=3, seed=0)
    assert len(drawn) == 3 and all(0.2 <= one["threshold"] <= 0.8 for one in drawn)
