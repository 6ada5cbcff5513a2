"""Figures show the numbers that they are drawn from: what was drawn is read back."""

import json
import math
import shutil
from collections.abc import Callable
from itertools import combinations
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from swap_hpc.bench.scaling_figure import draw_scaling
from swap_hpc.run.folder import load_result
from swap_hpc.study.figures.curves import draw_curves
from swap_hpc.study.figures.landscape import draw_landscape, error_levels
from swap_hpc.study.figures.methods import draw_methods
from swap_hpc.study.figures.style import LARGE_BATCH, SWAP, method_colours
from swap_hpc.study.figures.trajectory import draw_trajectory
from swap_hpc.study.numbers import Line, lines
from swap_hpc.study.plan import Plan
from swap_hpc.study.report import write_report
from swap_hpc.study.study import load_study, shipped_studies
from swap_hpc.study.table import spread

RUNS = Path(__file__).parents[2] / "tests" / "runs"

LANDSCAPE = RUNS / "cifar10-cpu-table" / "swap" / "seed-0" / "landscape.json"
SCALING = RUNS / "scaling" / "scaling.json"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(RUNS / "cifar10-cpu", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that a test draws."""
    saved = []
    savefig = Figure.savefig

    def watched(figure: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    return saved


def values(axis: Axes) -> list[list[float]]:
    """Return y of all lines."""
    return [np.asarray(line.get_ydata(), float).tolist() for line in axis.lines]


@pytest.mark.parametrize("name", ["cifar10-cpu", "cifar10-cpu-large-batch"])
def test_curves_are_drawn_of_any_run(name: str, tmp_path: Path) -> None:
    draw_curves(RUNS / name, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("where", ["somewhere", "everywhere"])
def test_what_is_not_finite_leaves_a_gap_and_a_report(
    where: str, run: Path, figures: list[Figure]
) -> None:
    names = ["world", "group-000", "group-001"]
    for name in names if where == "somewhere" else [p.stem for p in (run / "metrics").iterdir()]:
        file = run / "metrics" / f"{name}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines[len(lines) // 2 :] if where == "somewhere" else lines:
            line |= {"test_accuracy": nan, "ema_test_accuracy": inf}
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = load_result(run)
    result["test_accuracy"] |= {"large_batch": nan, "mean_of_groups": nan, "averaged": inf}
    (run / "result.json").write_text(json.dumps(result))
    assert "| nan" in write_report(run).read_text()
    # the line that marks the phases has two points
    drawn = [y for line in values(figures[0].axes[0]) if len(line) > 2 for y in line]
    assert np.isnan(drawn).any() and np.isfinite(drawn).any() == (where == "somewhere")


def test_a_landscape_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    content = json.loads(LANDSCAPE.read_text())
    levels = error_levels(content)
    kind = next(key for key in content["planes"][0] if key.startswith("test_"))
    content["planes"][0][kind][0][0] = nan
    assert np.allclose(error_levels(content)[:2], levels[:2])
    draw_landscape(content, tmp_path / "landscape.png")
    for plane in content["planes"]:
        plane[kind] = np.full_like(plane[kind], nan).tolist()
    draw_landscape(content, tmp_path / "landscape.png")


def test_a_study_with_a_metric_that_is_not_finite_has_its_table_and_figure(tmp_path: Path) -> None:
    seconds = {0: 1.0, 1: 2.0}
    lines = [
        Line(name, None, "1", 1, 1, {0: value, 1: 0.5}, seconds, seconds)
        for name, value in (("a", nan), ("b", 0.25))
    ]
    assert [spread([*line.values.values()], ".2f") for line in lines] == ["nan", "0.38 ± 0.18"]
    draw_methods("study", lines, (), "accuracy", tmp_path / "study.png")


def test_curves_show_what_the_metrics_say(run: Path, figures: list[Figure]) -> None:
    """A changed metric is a changed line."""
    draw_curves(run, run / "curves.png")
    text = (run / "metrics" / "group-002.jsonl").read_text()
    group = [json.loads(line)["test_accuracy"] for line in text.splitlines()]
    accuracy = load_result(run)["test_accuracy"]
    drawn = values(figures[0].axes[0])
    assert [100 * share for share in (accuracy["large_batch"], *group)] in drawn
    assert [100 * accuracy["averaged"]] in drawn


def test_moving_averages_are_drawn_beside_the_models(run: Path, figures: list[Figure]) -> None:
    """Dashed, from the epochs that have them; the labels say what they are."""
    for name, shares in (("world", (0.5, 0.6, 0.7)), ("group-001", (0.81, 0.82, 0.83))):
        file = run / "metrics" / f"{name}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line, share in zip(lines, shares, strict=False):
            line["ema_test_accuracy"] = share
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(run, run / "curves.png")
    left, right = figures[0].axes[:2]
    for axis in (left, right):
        dashed = [line for line in axis.lines if line.get_linestyle() == "--"]
        drawn = [np.asarray(line.get_ydata(), float).tolist() for line in dashed]
        assert [50.0, 60.0, 70.0] in drawn and [81.0, 82.0, 83.0] in drawn
    words = [[text.get_text() for text in axis.texts] for axis in (left, right)]
    assert words[0].count("EMA of the weights") == 1


def test_the_averages_curve_begins_and_ends_where_the_groups_do(
    run: Path, figures: list[Figure]
) -> None:
    line: dict[str, Any] = {"phase": "evaluation", "model": "average"}
    with open(run / "metrics" / "world.jsonl", "a", encoding="utf-8") as file:
        for epoch, accuracy in ((1, 0.81), (2, 0.82)):
            more = {"epoch": epoch, "test_accuracy": accuracy}
            file.write(json.dumps(line | more) + "\n")
    draw_curves(run, run / "curves.png")
    ends = load_result(run)["test_accuracy"]
    expected = [100 * share for share in (ends["large_batch"], 0.81, 0.82, ends["averaged"])]
    assert expected in values(figures[0].axes[0])


def test_the_learning_rate_is_that_of_every_step(run: Path, figures: list[Figure]) -> None:
    """From 0 in the warm-up, and from the refinement's own first rate, as the recipe has it."""
    draw_curves(run, run / "curves.png")
    large_batch, refine = figures[0].axes[2].lines[:2]
    x, y = np.asarray(large_batch.get_xdata()), np.asarray(large_batch.get_ydata())
    assert len(x) == 12 * 48 and (x[0], y[0]) == (0, 0)
    assert y[np.flatnonzero(x == 3)] == pytest.approx(0.8)
    x, y = np.asarray(refine.get_xdata()), np.asarray(refine.get_ydata())
    assert len(x) == 4 * 390 and (x[0], y[0]) == (12, pytest.approx(0.05))
    assert y[-1] == pytest.approx(0.05 / 4 / 390)


@pytest.mark.parametrize("samples", [100, 2000, 100_000])
def test_contour_lines_are_not_finer_than_the_samples_resolve(samples: int) -> None:
    content = json.loads(LANDSCAPE.read_text()) | {"samples": samples}
    levels = error_levels(content)
    errors = np.concatenate([np.ravel(plane["test_error"]) for plane in content["planes"]])
    middle = float(np.median(errors))
    # the committed errors are those of 2,000 samples, whatever the file says
    standard_error = 100 * math.sqrt(middle * (1 - middle) / min(samples, 2000))
    assert np.diff(levels).min() > 0.8 * standard_error
    assert 2 <= len(levels) <= 12 and levels[0] <= 100 * errors.min()


def test_train_and_test_error_share_one_scale(tmp_path: Path, figures: list[Figure]) -> None:
    draw_landscape(json.loads(LANDSCAPE.read_text()), tmp_path / "landscape.png")
    scales = {tuple(axis.collections[0].get_clim()) for axis in figures[0].axes[:4]}
    assert len(scales) == 1 and len(figures[0].axes) == 5  # four planes, one colour bar


def test_the_zero_bytes_of_phase_2_are_seen(tmp_path: Path, figures: list[Figure]) -> None:
    content = json.loads(SCALING.read_text())
    draw_scaling(content["cases"], "two cores", tmp_path / "scaling.png")
    for axis in figures[0].axes[3:6]:
        refine = next(line for line in axis.lines if line.get_label() == "phase 2: refinement")
        pixels = refine.get_transform().transform(np.asarray(refine.get_xydata()))
        assert np.asarray(refine.get_ydata()).tolist() == [0] * len(pixels)
        assert (pixels[:, 1] > axis.get_window_extent().y0).all()


def drawn_study(name: str, file: Path) -> list[Line]:
    plan = Plan(load_study(name), RUNS / name)
    table = lines(plan)
    draw_methods(plan.study.title, table, {"SWAP before averaging"}, "accuracy", file)
    return table


@pytest.mark.parametrize("name", ["cifar10-cpu-table", "cifar10-cpu-time"])
def test_a_study_shows_means_and_spreads(name: str, tmp_path: Path, figures: list[Figure]) -> None:
    table = drawn_study(name, tmp_path / "study.png")
    axis = figures[0].axes[0]
    drawn = {tuple(np.asarray(line.get_ydata(), float).round(9)) for line in axis.lines}
    for line in table:
        accuracy = 100 * np.array([*line.values.values()])
        mean, spread = accuracy.mean(), accuracy.std(ddof=1)
        assert (mean.round(9),) in drawn
        assert ((mean - spread).round(9), (mean + spread).round(9)) in drawn
    texts = [text.get_text().replace("\n", " ") for text in axis.texts]
    assert sorted(texts) == sorted(line.method for line in table)


def draw_committed(file: Path) -> dict[str, Callable[[], object]]:
    scaling, landscape = json.loads(SCALING.read_text()), json.loads(LANDSCAPE.read_text())
    return {
        "curves": lambda: draw_curves(RUNS / "cifar10-cpu", file),
        "table": lambda: drawn_study("cifar10-cpu-table", file),
        "time": lambda: drawn_study("cifar10-cpu-time", file),
        "landscape": lambda: draw_landscape(landscape, file),
        "scaling": lambda: draw_scaling(scaling["cases"], "all ranks share 2 cores", file),
        "trajectory": lambda: draw_trajectory(TRAJECTORY, file),
    }


TRAJECTORY = {
    "recipe": "digits",
    "seed": 0,
    "large_batch_epochs": 2,
    "snapshots": [
        {"part": part, "epoch": epoch, "cosine": 0.1 * epoch, "distance": 1.0}
        for part in ("large_batch", "group-000", "group-001")
        for epoch in (1, 2)
    ],
    "between_groups": [
        {"epoch": epoch, "groups": ["group-000", "group-001"], "distance": 0.5 * epoch}
        for epoch in (1, 2)
    ],
}


@pytest.mark.parametrize("name", draw_committed(Path()))
def test_no_label_covers_another_or_leaves_the_figure(
    name: str, tmp_path: Path, figures: list[Figure]
) -> None:
    draw_committed(tmp_path / "figure.png")[name]()
    (figure,) = figures
    for axis in figure.axes:
        boxes = []
        for text in axis.texts:
            text.get_window_extent()  # moves an annotation to its place
            boxes.append(Text.get_window_extent(text))  # without the line to its point
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_the_groups_part_where_phase_1_ends(tmp_path: Path, figures: list[Figure]) -> None:
    draw_trajectory(TRAJECTORY, tmp_path / "trajectory.png")
    cosines, distances = figures[0].axes
    assert [0.2, 0.1, 0.2] in values(cosines) and [0.0, 0.5, 1.0] in values(distances)


def test_a_method_has_one_colour_in_all_studies() -> None:
    methods = [row.method for name in shipped_studies() for row in load_study(name).rows]
    colours = dict(zip(methods, method_colours(methods), strict=True))
    assert colours["SWAP after averaging"] == colours["SWAP, 2 cycles of 20: after"] == SWAP
    assert colours["large batch (1,024)"] == colours["large batch (4,096)"] == LARGE_BATCH
    first, second = method_colours(["mine", "yours"])
    assert first != second
