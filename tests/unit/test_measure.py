"""How a bench judges: ratios of neighbours, bars, and what its table says."""

import json
from pathlib import Path

import pytest

from swap_hpc.bench import BENCHES, NAMES
from swap_hpc.bench.measure import Comparison, alternately, as_json, table

FAST, SLOW = [10.0, 12.0, 8.0], [5.0, 4.0, 8.0]


def comparison(**fields: object) -> Comparison:
    return Comparison("b", "ours", "theirs", "images/s", FAST, SLOW, **fields)  # type: ignore[arg-type]


def test_the_ratio_is_of_neighbours_and_its_median_counts() -> None:
    assert comparison().ratios == [1.0, 2.0, 3.0]
    assert [comparison(bar=bar).met for bar in (None, 2.0, 2.1)] == [None, True, False]
    assert [comparison(bar=bar, at_most=True).met for bar in (1.9, 2.0)] == [False, True]
    assert (
        comparison(difference=True).ratios == [0.0, 5.0, 8.0]
        and comparison(difference=True, bar=5.0, at_most=True).met
    )


def test_the_table_says_what_was_missed() -> None:
    text = table([comparison(bar=2.1, note="why"), comparison(bar=1.5), comparison()])
    for part in (
        "2.000 (1.000 to 3.000)",
        "at least 2.1",
        "**missed**",
        "| met",
        "| reported",
        "- b, ours: why",
    ):
        assert part in text
    assert [each["met"] for each in as_json([comparison(bar=2.1), comparison()])] == [False, None]


def test_two_things_are_measured_in_turn_after_a_run_that_does_not_count() -> None:
    order: list[str] = []

    def said(name: str) -> float:
        order.append(name)
        return float(len(order))

    one, other = alternately(lambda: said("a"), lambda: said("b"), 3)
    assert "".join(order) == "abababab" and one == [3, 5, 7] and other == [4, 6, 8]


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_is_there_and_listed(name: str) -> None:
    import importlib

    module, _, function = BENCHES[name].where.partition(":")
    assert (
        callable(getattr(importlib.import_module(f"swap_hpc.bench.{module}"), function))
        and name in NAMES
    )


def test_the_pages_table_is_that_of_the_committed_run() -> None:
    root = Path(__file__).parents[2]
    rows = json.loads((root / "tests" / "runs" / "bench" / "all.json").read_text())["comparisons"]
    read = [
        Comparison(
            **{key: value for key, value in row.items() if key in Comparison.__dataclass_fields__}
        )
        for row in rows
    ]
    assert {each.bench for each in read} == set(BENCHES)
    assert (
        table(read).partition("\n\n")[0] in (root / "swap_hpc" / "bench" / "README.md").read_text()
    )
