"""The learning rate as a pure function of the epoch."""

from itertools import pairwise

Knots = tuple[tuple[float, float], ...]


def interpolate(knots: Knots, epoch: float) -> float:
    """The value at `epoch` (in epochs, fractions allowed): linear between knots, constant outside them.

    >>> interpolate(((0, 0.0), (2, 1.0), (4, 0.0)), 3.0)
    0.5
    """
    if epoch <= knots[0][0]:
        return knots[0][1]
    for (left, low), (right, high) in pairwise(knots):
        if epoch <= right:
            return max(0.0, low + (high - low) * (epoch - left) / (right - left))  # not -1e-17
    return knots[-1][1]
