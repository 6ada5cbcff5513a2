"""The files of a run -> tables and figures. Imports neither torch nor MPI."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from swap_hpc import figures
from swap_hpc.figures import load_result


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
    """Writes `report.md` and its figures into a run's folder, and returns the first one's path. Raises UserError."""
    text = f"# {run.name}\n\n{table(load_result(run))}\n\n![accuracy and learning rate](curves.png)\n"
    figures.curves(run, run / "curves.png")
    text += "".join(f"\n![{figure.stem}]({figure.name})\n" for figure in figures.redraw(run))
    figures.put(run / "report.md", text)
    return run / "report.md"
