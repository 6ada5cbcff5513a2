"""Tables and figures from a committed run, and the pages' figures against it."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from swap_hpc.errors import UserError
from swap_hpc.run.folder import load_result, load_run
from swap_hpc.study import figures, report
from swap_hpc.study import table as study_report
from swap_hpc.study.study import Plan, load_study

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "tests" / "runs"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(RUNS / "cifar10-cpu", tmp_path / "run")
    return tmp_path / "run"


def test_the_table_holds_the_results_numbers() -> None:
    result = load_result(RUNS / "cifar10-cpu")
    table = report.table(result)
    for accuracy in (
        *result["test_accuracy"]["groups"],
        result["test_accuracy"]["averaged"],
        result["test_accuracy"]["mean_of_groups"],
    ):
        assert f"| {100 * accuracy:.2f} " in table
    assert f"| {result['seconds']['total']:.1f} " in table and "4 of refinement per group" in table


def test_the_table_of_plain_sgd_has_no_groups() -> None:
    table = report.table(load_result(RUNS / "cifar10-cpu-large-batch"))
    assert (
        "group" not in table.replace("groups; ", "").replace("per group", "")
        and "averaged" not in table
    )


def test_cycles_have_rows_of_their_own() -> None:
    result = load_result(RUNS / "cifar10-cpu") | {"groups": 2, "cycles": 2}
    assert "| group 1, cycle 2 " in report.table(result)


@pytest.mark.parametrize("name", ["cifar10-cpu", "cifar10-cpu-large-batch"])
def test_figures_are_drawn_of_any_run(name: str, tmp_path: Path) -> None:
    figures.curves(RUNS / name, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def watched_lines(monkeypatch: pytest.MonkeyPatch) -> list[list[list[float]]]:
    """The y values of the lines on the first axes of each figure that is saved from now on."""
    from matplotlib.figure import Figure

    drawn: list[list[list[float]]] = []

    def savefig(figure: Figure, file: Path, **arguments: object) -> None:
        drawn.append([np.asarray(line.get_ydata()).tolist() for line in figure.axes[0].lines])
        file.touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn


def test_a_figure_shows_what_the_metrics_say(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drawn lines are read back: a changed metric is a changed line."""
    drawn = watched_lines(monkeypatch)
    figures.curves(run, run / "curves.png")
    lines = [
        json.loads(text) for text in (run / "metrics" / "group-002.jsonl").read_text().splitlines()
    ]
    expected = [
        100 * load_result(run)["test_accuracy"]["large_batch"],
        *(100 * line["test_accuracy"] for line in lines),
    ]
    assert expected in drawn[0]
    assert [100 * load_result(run)["test_accuracy"]["averaged"]] in drawn[0]


def test_the_averaged_models_curve_begins_and_ends_where_the_groups_do(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = watched_lines(monkeypatch)
    with open(run / "metrics" / "world.jsonl", "a", encoding="utf-8") as file:
        for epoch in (1, 2):
            file.write(
                json.dumps(
                    {
                        "phase": "evaluation",
                        "model": "average",
                        "epoch": epoch,
                        "test_accuracy": 0.8 + epoch / 100,
                    }
                )
                + "\n"
            )
    figures.curves(run, run / "curves.png")
    accuracy = load_result(run)["test_accuracy"]
    assert [100 * a for a in (accuracy["large_batch"], 0.81, 0.82, accuracy["averaged"])] in drawn[
        0
    ]


def test_a_run_that_is_not_complete_is_named(run: Path) -> None:
    (run / "result.json").unlink()
    with pytest.raises(UserError, match="run has not finished yet"):
        load_result(run)


def test_a_run_on_its_way_is_reported_as_far_as_it_is(run: Path) -> None:
    (run / "result.json").unlink()
    (run / "metrics" / "group-001.jsonl").unlink()
    world = run / "metrics" / "world.jsonl"
    world.write_text(
        "".join(
            line for line in world.read_text().splitlines(keepends=True) if '"swap"' not in line
        )
        + '{"phase": "eva'
    )
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
    assert (
        "0 of at most 12 epochs of phase 1; the loss is nan in large_batch, epoch 1"
        in (run / "report.md").read_text()
    )


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
    content = json.loads(
        (RUNS / "cifar10-cpu-table" / "swap" / "seed-0" / "landscape.json").read_text()
    )
    for plane in content["planes"]:
        errors = {
            model["name"]: model["test_error"] for model in plane["models"] if model["in_plane"]
        }
        assert "swap" not in errors or errors["swap"] < min(
            error for name, error in errors.items() if name != "swap"
        )
        grid = [value for row in plane["test_error"] for value in row]
        assert (
            min(grid) < min(errors.values()) + 0.01 and max(grid) > max(errors.values()) + 0.02
        )  # a basin, with its walls
