"""The files of a run -> tables and figures. Imports neither torch nor MPI."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from swap_hpc.errors import UserError

Lines = list[dict[str, Any]]  # of a metrics file


def load_result(run: Path) -> dict[str, Any]:
    """What `result.json` of a run's folder holds. Raises UserError where the folder holds no complete run."""
    try:
        return json.loads((run / "result.json").read_text())
    except FileNotFoundError:
        state = "has not finished yet" if (run / "recipe.toml").is_file() else "is not a run's folder"
        raise UserError(f"{run} {state}: there is no result.json in it") from None


def table(result: dict[str, Any]) -> str:
    """A result as a Markdown table: the accuracies, then the seconds of each phase."""
    accuracy, loss, seconds = result["test_accuracy"], result["test_loss"], result["seconds"]
    names = [
        f"group {g}" + (f", cycle {c + 1}" if result["cycles"] > 1 else "")
        for g in range(result["groups"])
        for c in range(result["cycles"])
    ]
    rows = [("end of phase 1 (large batch)", accuracy["large_batch"], loss["large_batch"])]
    if accuracy["groups"]:
        rows += list(zip(names, accuracy["groups"], loss["groups"], strict=True))
        rows.append(("mean of groups (before averaging)", accuracy["mean_of_groups"], loss["mean_of_groups"]))
        rows.append(("**averaged (SWAP)**", accuracy["averaged"], loss["averaged"]))
    first = markdown(("model", "test accuracy %", "test loss"), [(name, f"{100 * a:.2f}", f"{b:.4f}") for name, a, b in rows])
    second = markdown(tuple(seconds), [tuple(f"{s:.1f}" for s in seconds.values())])
    head = f"{result['recipe']}, seed {result['seed']}: {result['ranks']} ranks, {result['groups']} groups"
    epochs = f"{result['epochs']['large_batch']} epochs of large batches, {result['epochs']['refine']} of refinement per group"
    return f"{head}; {epochs}\n\n{first}\n\nseconds (the slowest rank's):\n\n{second}"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_report(run: Path) -> Path:
    """Writes `report.md` and `curves.png` into a run's folder, and returns the first one's path. Raises UserError."""
    text = f"# {run.name}\n\n{table(load_result(run))}\n\n![accuracy and learning rate](curves.png)\n"
    curves(run, run / "curves.png")
    (run / "report.md").write_text(text)
    return run / "report.md"


def curves(run: Path, figure: Path) -> None:
    """Draws test accuracy and learning rate against epochs: the large batch, every group, and the averaged model's point.

    Where there was a refinement, a second pair of axes shows it alone, on a scale of its own.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    result = load_result(run)
    large_batch = [line for line in _lines(run / "metrics" / "world.jsonl") if line["phase"] == "large_batch"]
    groups = [_lines(path) for path in sorted((run / "metrics").glob("group-*.jsonl"))]
    averages = [line for line in _lines(run / "metrics" / "world.jsonl") if line.get("model") == "average"]
    views = 2 if groups else 1
    ratios, size = {"height_ratios": (3, 1), "width_ratios": (1, 0.8)[:views]}, (1.5 + 3.5 * views, 5)
    fig, axes = plt.subplots(2, views, sharex="col", squeeze=False, layout="constrained", figsize=size, gridspec_kw=ratios)
    for top, bottom in axes.T:
        _draw(top, bottom, result, large_batch, groups, averages)
        bottom.set_xlabel("epoch")
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[1, 0].set_ylabel("learning rate")
    if groups:
        _zoom(axes[0, 1], axes[1, 1], result, groups, averages)
    axes[0, -1].legend(loc="lower right", fontsize="small")
    fig.suptitle(f"{result['recipe']}, seed {result['seed']}, {result['ranks']} ranks")
    fig.savefig(figure, dpi=120)
    plt.close(fig)


def _draw(
    top: Any,
    bottom: Any,
    result: dict[str, Any],
    large_batch: list[dict[str, Any]],
    groups: list[list[dict[str, Any]]],
    averages: list[dict[str, Any]],
) -> None:
    begin, accuracy = result["epochs"]["large_batch"], result["test_accuracy"]
    fork = [(begin, 100 * accuracy["large_batch"])]
    top.plot(*_points(large_batch, 0), color="black", label="large batch")
    bottom.plot(*_points(large_batch, 0, "learning_rate", 1), color="black", lw=1)
    for number, lines in enumerate(groups):
        top.plot(*_points(lines, begin, before=fork), alpha=0.8, lw=1.2, label=f"group {number}" if len(groups) <= 8 else None)
        bottom.plot(*_points(lines, begin, "learning_rate", 1), color="C0", lw=1)
    if accuracy["averaged"] is not None:
        end = begin + result["epochs"]["refine"]
        mean, averaged = 100 * accuracy["mean_of_groups"], 100 * accuracy["averaged"]
        top.plot(end, mean, "o", color="grey", label=f"mean of groups {mean:.2f}")
        if averages:  # evaluated on the way
            epochs, values = _points(averages, begin, before=fork)
            top.plot([*epochs, end], [*values, averaged], color="red", lw=1.5)
        top.plot(end, averaged, "*", color="red", ms=12, label=f"averaged {averaged:.2f}")


def _points(
    lines: Lines, start: int, field: str = "test_accuracy", scale: float = 100, before: Sequence[tuple[float, float]] = ()
) -> tuple[list[float], list[float]]:
    """Epochs of the run and values of a field, where it was measured."""
    points = [*before, *((start + line["epoch"], scale * line[field]) for line in lines if line[field] is not None)]
    return [x for x, _ in points], [y for _, y in points]


def _zoom(top: Any, bottom: Any, result: dict[str, Any], groups: list[Lines], averages: Lines) -> None:
    """Limits the axes to the refinement."""
    begin, accuracy = result["epochs"]["large_batch"], result["test_accuracy"]
    curves = [y for lines in (*groups, averages) for y in _points(lines, begin)[1]]
    values = [100 * accuracy["large_batch"], 100 * accuracy["averaged"], *curves]
    margin = 0.05 * (max(values) - min(values)) + 0.1
    top.set(
        xlim=(begin - 0.1, begin + result["epochs"]["refine"] + 0.3), ylim=(min(values) - margin, max(values) + margin), title="refinement"
    )
    highest = max(line["learning_rate"] for lines in groups for line in lines)
    bottom.set_ylim(-0.05 * highest, 1.1 * highest or 1)


def _lines(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
