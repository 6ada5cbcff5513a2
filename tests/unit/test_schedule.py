"""The learning-rate schedule: linear between knots, constant outside them."""

import pytest

from swap_hpc.recipe.schedule import interpolate

WARM_UP = ((0.0, 0.0), (5.0, 1.0), (15.0, 0.0))


@pytest.mark.parametrize(
    ("epoch", "value"), [(-1, 0), (0, 0), (2.5, 0.5), (5, 1), (10, 0.5), (15, 0), (99, 0)]
)
def test_linear_between_knots_and_constant_outside(epoch: float, value: float) -> None:
    assert interpolate(WARM_UP, epoch) == pytest.approx(value)


def test_one_knot_is_a_constant() -> None:
    assert interpolate(((0.0, 0.1),), 7.3) == 0.1
