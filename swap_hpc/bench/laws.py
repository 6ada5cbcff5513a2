"""The laws by which costs grow with the number of ranks, fitted to measurements."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# How much of the measured values a law may leave unexplained: the root of the mean square of the
# differences, over their mean. The first law that explains so much is taken.
UNEXPLAINED = 0.03

# Name -> what grows with it; each law is a constant and a multiple of that.
GROWTH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "constant": np.zeros_like,
    "bounded": lambda ranks: -1 / ranks,  # as of a ring's 2 (n - 1) / n
    "logarithm": np.log2,
    "linear": lambda ranks: ranks,
}


class Law(NamedTuple):
    """A fitted law: `constant + factor * growth(ranks)`."""

    name: str  # a key of `GROWTH`
    constant: float
    factor: float

    def at(self, ranks: int) -> float:
        """Return what the law predicts for a number of ranks."""
        grown = float(GROWTH[self.name](np.array([float(ranks)]))[0])
        return self.constant + self.factor * grown


def fitted(ranks: Sequence[int], values: Sequence[float]) -> Law:
    """Return the slowest-growing law that explains measurements, else the one that does so best.

    Args:
        ranks: at least two numbers of ranks.
        values: what was measured on each.
    """
    found = [(_residual(law, ranks, values), law) for law in _laws(ranks, values)]
    enough = [law for residual, law in found if residual <= UNEXPLAINED]
    return enough[0] if enough else min(found, key=lambda each: each[0])[1]


def _laws(ranks: Sequence[int], values: Sequence[float]) -> list[Law]:
    laws = []
    for name, growth in GROWTH.items():
        grown = growth(np.array(ranks, dtype=np.float64))
        columns = np.stack([np.ones_like(grown), grown], axis=1)
        (constant, factor), *_ = np.linalg.lstsq(columns, np.array(values, float), rcond=None)
        if factor >= 0:
            laws.append(Law(name, float(constant), float(factor)))
    return laws


def _residual(law: Law, ranks: Sequence[int], values: Sequence[float]) -> float:
    """Return the root mean square of what a law leaves unexplained, over the values' mean."""
    differences = np.array([law.at(n) for n in ranks]) - np.array(values)
    return float(np.sqrt((differences**2).mean()) / max(np.mean(values), 1e-9))
