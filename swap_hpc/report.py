"""The files of a run -> tables and figures. Imports neither torch nor MPI."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from swap_hpc.errors import UserError


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
    """Draws test accuracy and learning rate against epochs: the large batch, every group, and the averaged model's point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    result = load_result(run)
    large_batch = [line for line in _lines(run / "metrics" / "world.jsonl") if line["phase"] == "large_batch"]
    groups = [_lines(path) for path in sorted((run / "metrics").glob("group-*.jsonl"))]
    begin = result["epochs"]["large_batch"]
    fig, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 1), layout="constrained")
    for lines, start, style in [
        (large_batch, 0, {"color": "black", "label": "large batch"}),
        *((g, begin, {"alpha": 0.8}) for g in groups),
    ]:
        epochs = [start + line["epoch"] for line in lines]
        tested = [(e, 100 * line["test_accuracy"]) for e, line in zip(epochs, lines, strict=True) if line["test_accuracy"] is not None]
        top.plot(*zip(*tested, strict=True), **style) if tested else None
        bottom.plot(epochs, [line["learning_rate"] for line in lines], color="black" if start == 0 else "C0", lw=1)
    if groups:
        top.plot([], [], color="C0", alpha=0.8, label=f"{len(groups)} groups")
        end, accuracy = begin + result["epochs"]["refine"], result["test_accuracy"]
        top.plot(end, 100 * accuracy["mean_of_groups"], "o", color="grey", label=f"mean of groups {100 * accuracy['mean_of_groups']:.2f} %")
        top.plot(end, 100 * accuracy["averaged"], "*", color="red", ms=12, label=f"averaged {100 * accuracy['averaged']:.2f} %")
        for axes in (top, bottom):
            axes.axvline(begin, color="grey", ls=":", lw=1)
    top.set(ylabel="test accuracy (%)", title=f"{result['recipe']}, seed {result['seed']}, {result['ranks']} ranks")
    top.legend(loc="lower right")
    bottom.set(xlabel="epoch", ylabel="learning rate")
    fig.savefig(figure, dpi=120)
    plt.close(fig)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
