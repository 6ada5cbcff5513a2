"""The laws that `bench ranks` fits: by name, and as far as they reach beyond what was measured."""

import pytest

from swap_hpc.bench.laws import fitted

RANKS = [4, 8, 16, 32]


@pytest.mark.parametrize(
    ("values", "name", "at_4096"),
    [
        ([7, 7, 7, 7], "constant", 7),
        ([0, 0, 0, 0], "constant", 0),
        ([1.5, 1.75, 1.875, 1.9375], "bounded", 2),  # of a ring: 2 (n - 1) / n
        ([20, 30, 40, 50], "logarithm", 120),
        ([140, 180, 260, 420], "linear", 41_060),
    ],
)
def test_a_law_is_found_by_its_values(values: list[float], name: str, at_4096: float) -> None:
    law = fitted(RANKS, values)
    assert law.name == name
    assert law.at(4096) == pytest.approx(at_4096, rel=0.01)


def test_the_slowest_growth_that_explains_is_taken() -> None:
    assert fitted(RANKS, [100, 99, 101, 100]).name == "constant"
    assert fitted(RANKS, [20, 31, 39, 50]).name == "logarithm"
    assert fitted([4, 8], [10, 20]).name != "linear"  # two numbers do not show a line
