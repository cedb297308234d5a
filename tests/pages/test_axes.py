"""Round numbers beside an axis."""

import pytest

from raypipe.pages.axes import levels


@pytest.mark.parametrize(
    "low, high, wanted",
    [
        (0.385, 0.7032, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
        (0.2, 0.4, [0.2, 0.25, 0.3, 0.35, 0.4]),
        (0.719, 0.721, [0.718, 0.72, 0.722]),
        (-3.0, 12.0, [-5.0, 0.0, 5.0, 10.0, 15.0]),
        (0.5, 0.5, [0.5, 0.502]),
    ],
)
def test_an_axis_has_round_numbers(low, high, wanted):
    assert levels(low, high) == pytest.approx(wanted)


def test_an_axis_of_very_small_numbers_may_be_shorter():
    assert levels(2e-6, 6e-6, least=1e-9) == pytest.approx([2e-6, 3e-6, 4e-6, 5e-6, 6e-6])
