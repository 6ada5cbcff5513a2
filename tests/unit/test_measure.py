"""How a bench judges: ratios of neighbours, bars, and its table."""

import importlib
import json
from pathlib import Path

import pytest

from swap_hpc.bench import BENCHES, NAMES, ranks
from swap_hpc.bench.measure import Comparison, alternately, as_json, from_json, table

ROOT = Path(__file__).parents[2]
FAST, SLOW = [10.0, 12.0, 8.0], [5.0, 4.0, 8.0]


def comparison(**fields: object) -> Comparison:
    return Comparison("b", "ours", "theirs", "images/s", FAST, SLOW, **fields)  # type: ignore[arg-type]


def test_neighbours_are_compared() -> None:
    assert comparison().ratios == [1.0, 2.0, 3.0]
    assert comparison(difference=True).ratios == [0.0, 5.0, 8.0]


@pytest.mark.parametrize(
    ("fields", "met"),
    [
        ({}, None),
        ({"bar": 2.0}, True),
        ({"bar": 2.1}, False),
        ({"bar": 1.9, "at_most": True}, False),
        ({"bar": 2.0, "at_most": True}, True),
        ({"bar": 5.0, "at_most": True, "difference": True}, True),
    ],
)
def test_the_median_meets_the_bar_or_misses_it(fields: dict[str, object], met: bool | None) -> None:
    assert comparison(**fields).met is met


def test_the_table_shows_ratio_spread_bar_verdict_and_note() -> None:
    text = table([comparison(bar=2.1, note="why"), comparison(bar=1.5), comparison()])
    assert "2.000 (1.000 to 3.000)" in text and "at least 2.1" in text
    assert "**missed**" in text and "| met" in text and "| reported" in text
    assert "- b, ours: why" in text


def test_comparisons_are_kept_as_json() -> None:
    made = [comparison(bar=2.1), comparison()]
    rows = as_json(made)
    assert [row["met"] for row in rows] == [False, None]
    assert from_json(json.loads(json.dumps(rows))) == made


def test_two_things_are_measured_in_turn_after_a_run_that_does_not_count() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    ours, peers = alternately(lambda: measure("a"), lambda: measure("b"), 3)
    assert "".join(order) == "abababab" and ours == [3, 5, 7] and peers == [4, 6, 8]


@pytest.mark.parametrize("name", BENCHES)
def test_every_bench_is_there_and_listed(name: str) -> None:
    module, _, function = BENCHES[name].where.partition(":")
    found = getattr(importlib.import_module(f"swap_hpc.bench.{module}"), function)
    assert callable(found) and name in NAMES


def test_the_pages_table_is_that_of_the_committed_run() -> None:
    file = ROOT / "tests" / "runs" / "bench" / "all.json"
    committed = from_json(json.loads(file.read_text(encoding="utf-8"))["comparisons"])
    assert {each.bench for each in committed} == {*BENCHES}
    rows, _, _ = table(committed).partition("\n\n")  # without the notes
    assert rows in (ROOT / "swap_hpc" / "bench" / "README.md").read_text(encoding="utf-8")


def test_the_pages_tables_of_ranks_are_those_of_the_committed_run() -> None:
    file = ROOT / "tests" / "runs" / "bench" / "ranks.json"
    cases = json.loads(file.read_text(encoding="utf-8"))["cases"]
    assert [case["ranks"] for case in cases] == [*ranks.NUMBERS]
    page = (ROOT / "swap_hpc" / "bench" / "README.md").read_text(encoding="utf-8")
    assert ranks.table(cases) in page
    assert ranks.laws(cases) in page
