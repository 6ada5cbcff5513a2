"""Tables and figures from a committed run, and the README's figures against it."""

import json
import shutil
from pathlib import Path

import pytest

from swap_hpc import figures, report
from swap_hpc.errors import UserError

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "tests" / "runs"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(RUNS / "cifar10-cpu", tmp_path / "run")
    return tmp_path / "run"


def test_the_table_holds_the_results_numbers() -> None:
    result = figures.load_result(RUNS / "cifar10-cpu")
    table = report.table(result)
    for accuracy in (*result["test_accuracy"]["groups"], result["test_accuracy"]["averaged"], result["test_accuracy"]["mean_of_groups"]):
        assert f"| {100 * accuracy:.2f} " in table
    assert f"| {result['seconds']['total']:.1f} " in table and "4 of refinement per group" in table


def test_the_table_of_plain_sgd_has_no_groups() -> None:
    table = report.table(figures.load_result(RUNS / "cifar10-cpu-large-batch"))
    assert "group" not in table.replace("groups; ", "").replace("per group", "") and "averaged" not in table


def test_cycles_have_rows_of_their_own() -> None:
    result = figures.load_result(RUNS / "cifar10-cpu") | {"groups": 2, "cycles": 2}
    assert "| group 1, cycle 2 " in report.table(result)


@pytest.mark.parametrize("name", ["cifar10-cpu", "cifar10-cpu-large-batch"])
def test_figures_are_drawn_of_any_run(name: str, tmp_path: Path) -> None:
    figures.curves(RUNS / name, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_shows_what_the_metrics_say(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drawn lines are read back: a changed metric is a changed line."""
    from matplotlib.figure import Figure

    drawn: list[list[list[float]]] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: drawn.append([list(x.get_ydata()) for x in figure.axes[0].lines]))
    figures.curves(run, run / "curves.png")
    lines = [json.loads(text) for text in (run / "metrics" / "group-002.jsonl").read_text().splitlines()]
    expected = [100 * figures.load_result(run)["test_accuracy"]["large_batch"], *(100 * line["test_accuracy"] for line in lines)]
    assert expected in drawn[0]
    assert [100 * figures.load_result(run)["test_accuracy"]["averaged"]] in drawn[0]


def test_the_averaged_models_curve_begins_and_ends_where_the_groups_do(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[list[list[float]]] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: drawn.append([list(x.get_ydata()) for x in figure.axes[0].lines]))
    with open(run / "metrics" / "world.jsonl", "a") as file:
        for epoch in (1, 2):
            file.write(json.dumps({"phase": "evaluation", "model": "average", "epoch": epoch, "test_accuracy": 0.8 + epoch / 100}) + "\n")
    figures.curves(run, run / "curves.png")
    accuracy = figures.load_result(run)["test_accuracy"]
    assert [100 * a for a in (accuracy["large_batch"], 0.81, 0.82, accuracy["averaged"])] in drawn[0]


def test_a_run_that_is_not_complete_is_named(run: Path) -> None:
    (run / "result.json").unlink()
    with pytest.raises(UserError, match="run has not finished yet"):
        figures.load_result(run)


def test_the_readmes_figures_are_those_of_the_committed_runs() -> None:
    readme = (ROOT / "README.md").read_text()
    swap, large = (figures.load_result(RUNS / name) for name in ("cifar10-cpu", "cifar10-cpu-large-batch"))
    for accuracy in (swap["test_accuracy"]["mean_of_groups"], swap["test_accuracy"]["averaged"], large["test_accuracy"]["large_batch"]):
        assert f"{100 * accuracy:.2f}" in readme
    assert (RUNS / "cifar10-cpu" / "curves.png").exists() and "tests/runs/cifar10-cpu/curves.png" in readme
