"""The learning rate as a pure function of the epoch."""

from itertools import pairwise

Knots = tuple[tuple[float, float], ...]


def interpolate(knots: Knots, epoch: float) -> float:
    """Return the value at `epoch`: linear between knots, constant outside them.

    Args:
        knots: (epoch, value) pairs, epochs ascending.
        epoch: Epochs since the schedule began; fractions are allowed.

    >>> interpolate(((0, 0.0), (2, 1.0), (4, 0.0)), 3.0)
    0.5
    """
    if epoch <= knots[0][0]:
        return knots[0][1]
    for (left, low), (right, high) in pairwise(knots):
        if epoch <= right:
            value = low + (high - low) * (epoch - left) / (right - left)
            return max(0.0, value)  # rounding may give -1e-17 beside a zero
    return knots[-1][1]
