"""Tables and figures from a committed run, and the pages' figures against it."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from swap_hpc.errors import UserError
from swap_hpc.run.folder import load_result, load_run
from swap_hpc.study import report
from swap_hpc.study import table as study_report
from swap_hpc.study.plan import Plan
from swap_hpc.study.study import load_study

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "tests" / "runs"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(RUNS / "cifar10-cpu", tmp_path / "run")
    return tmp_path / "run"


def test_the_table_holds_the_results_numbers() -> None:
    result = load_result(RUNS / "cifar10-cpu")
    table = report.table(result)
    accuracies = result["test_accuracy"]
    summary = (accuracies["averaged"], accuracies["mean_of_groups"])
    for accuracy in (*accuracies["groups"], *summary):
        assert f"| {100 * accuracy:.2f} " in table
    assert f"| {result['seconds']['total']:.1f} " in table and "4 of refinement per group" in table


def test_the_table_of_plain_sgd_has_no_groups() -> None:
    table = report.table(load_result(RUNS / "cifar10-cpu-large-batch"))
    rows = table.partition("\n\n")[2]
    assert "group" not in rows and "averaged" not in rows


def test_cycles_have_rows_of_their_own() -> None:
    result = load_result(RUNS / "cifar10-cpu") | {"groups": 2, "cycles": 2}
    assert "| group 1, cycle 2 " in report.table(result)


def test_a_run_that_is_not_complete_is_named(run: Path) -> None:
    (run / "result.json").unlink()
    with pytest.raises(UserError, match="run has not finished yet"):
        load_result(run)


def test_a_run_on_its_way_is_reported_as_far_as_it_is(run: Path) -> None:
    (run / "result.json").unlink()
    (run / "metrics" / "group-001.jsonl").unlink()
    world = run / "metrics" / "world.jsonl"
    lines = [line for line in world.read_text().splitlines(keepends=True) if '"swap"' not in line]
    half_a_line = '{"phase": "eva'
    world.write_text("".join(lines) + half_a_line)
    text = report.table(load_run(run))
    assert "not complete: epochs of the groups so far: 4, 0, 4, 4" in text
    for row in (
        "| group 1                           | -   ",
        "| group 2                           | 85.53",
        "| **averaged (SWAP)**               | -",
    ):
        assert row in text
    assert report.write_report(run).is_file() and (run / "curves.png").is_file()


def test_a_run_that_broke_off_early_is_reported_with_the_reason(run: Path) -> None:
    (run / "result.json").unlink()
    shutil.rmtree(run / "metrics")
    (run / "diverged.json").write_text('{"why": "the loss is nan in large_batch, epoch 1"}')
    report.write_report(run)
    message = "0 of at most 12 epochs of phase 1; the loss is nan in large_batch, epoch 1"
    assert message in (run / "report.md").read_text()


def test_the_page_needs_no_other_file(run: Path) -> None:
    report.write_report(run)
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "86.52" in page and "[large_batch]" in page
    HTMLParser().feed(page)
    assert not re.search(r'(src|href)="(?!data:)', page)


def table_rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ")]


def cells_of(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize(("name", "rows"), [("cifar10-cpu-table", 14), ("cifar10-cpu-time", 8)])
def test_the_pages_tables_are_those_of_the_committed_runs(name: str, rows: int) -> None:
    page = (ROOT / "swap_hpc" / "study" / "README.md").read_text()
    plan = Plan(load_study(name), RUNS / name)
    assert all(trial.result for trial in plan.trials() + plan.reported())
    text = study_report.text(plan)
    made = table_rows(text.partition("## Search")[0])
    assert len(made) == rows and [row for row in made if row not in page] == []
    assert (plan.out / "study.md").read_text().startswith(text[:200])


def model_epochs(epochs: str, workers: str) -> int:
    """Return the epochs of all copies: those of "12 + 1 x 4" are trained in each of its groups."""
    first, _, refine = epochs.partition(" + ")
    cycles, _, each = refine.rpartition(" x ")
    if cycles or not refine:  # one copy: plain SGD, or sequential SWA
        return int(first) + int(cycles or 1) * int(each or 0)
    return int(first) + int(workers) * int(each)


def test_the_readmes_table_is_an_extract_of_the_committed_study() -> None:
    """The README leaves one column out and adds the computing of each row."""
    readme = (ROOT / "README.md").read_text().partition("## Result")[2].partition("\n## ")[0]
    study = (RUNS / "cifar10-cpu-table" / "study.md").read_text().partition("\n## ")[0]
    expected = []
    for row in table_rows(study)[1:]:
        method, epochs, workers, accuracy, seconds, _ = cells_of(row)
        trained = str(model_epochs(epochs, workers))
        expected.append([method, epochs, workers, trained, accuracy, seconds])
    assert [cells_of(row) for row in table_rows(readme)[1:]] == expected


def test_the_readmes_numbers_are_those_of_the_committed_studies() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    study = (RUNS / "cifar10-cpu-table" / "study.md").read_text()
    differences = {cells_of(row)[0]: cells_of(row)[1:] for row in table_rows(study)}
    points, interval = differences["SWAP after averaging - SWAP before averaging"]
    low, _, high = interval.replace("+", "").split()
    assert f"adds {points[1:]} points (95 % interval {low} to {high})" in readme
    points, _ = differences["SWAP after averaging - small batch (128)"]
    assert f"The difference to small batches, {points[1:]}," in readme
    timed = (RUNS / "cifar10-cpu-time" / "study.md").read_text()
    rows = {cells_of(row)[0]: cells_of(row)[3:] for row in table_rows(timed)}
    for method in ("SWAP after averaging", "small batch (128), two cores, 12 epochs"):
        accuracy, seconds = (cell.split()[0] for cell in rows[method])
        assert f"{accuracy} % in {seconds} s" in readme


def test_the_figures_that_the_pages_show_are_there() -> None:
    for file in (
        "cifar10-cpu/curves.png",
        "cifar10-cpu-table/swap/seed-0/landscape.png",
        "cifar10-cpu-table/swap/seed-0/landscape.json",
    ):
        assert (RUNS / file).is_file()


def test_the_average_lies_in_the_basin_of_its_groups() -> None:
    file = RUNS / "cifar10-cpu-table" / "swap" / "seed-0" / "landscape.json"
    for plane in json.loads(file.read_text())["planes"]:
        inside = [model for model in plane["models"] if model["in_plane"]]
        errors = {model["name"]: model["test_error"] for model in inside}
        if "swap" in errors:
            assert min(errors, key=lambda name: errors[name]) == "swap"
        grid = [value for row in plane["test_error"] for value in row]
        # a basin, with its walls
        assert min(grid) < min(errors.values()) + 0.01
        assert max(grid) > max(errors.values()) + 0.02
