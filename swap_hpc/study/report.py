"""The report of a run: its table and figures, as Markdown and as one HTML page.

Imports neither torch nor MPI.
"""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

from swap_hpc.parallel.atomic import write_text
from swap_hpc.recipe.markdown import markdown_table
from swap_hpc.recipe.metrics import heading, metric_names, shown
from swap_hpc.recipe.wording import count
from swap_hpc.run.folder import load_run
from swap_hpc.study.figures.curves import draw_curves
from swap_hpc.study.figures.landscape import draw_landscape
from swap_hpc.study.figures.trajectory import draw_trajectory


def table(result: dict[str, Any]) -> str:
    """Return a result as Markdown: the metrics, then the seconds of each phase if complete.

    Args:
        result: what `run.folder.load_run` returns.
    """
    seconds = result["seconds"]
    metrics = metric_names(result)
    columns = [
        (f"{split} {heading(name)}", _column(result, split, name))
        for split in ("validation", "test")
        for name in (*metrics, "loss")
        if f"{split}_{name}" in result
    ]
    names = [name for name, _ in _rows(result, result["test_loss"])]
    rows = zip(names, *(cells for _, cells in columns), strict=True)
    head = ("model", *(title for title, _ in columns))
    parts = [_head(result), markdown_table(head, [*rows])]
    if seconds:
        row = [f"{each:.1f}" for each in seconds.values()]
        parts += ["seconds (the slowest rank's):", markdown_table([*seconds], [row])]
    if "state" in result:
        parts.append(f"not complete: {result['state']}")
    return "\n\n".join(parts)


def _head(result: dict[str, Any]) -> str:
    epochs = result["epochs"]
    ranks = count(result["ranks"], "rank") if result["ranks"] else "unknown number of ranks"
    return (
        f"{result['recipe']}, seed {result['seed']}: {ranks}, "
        f"{count(result['groups'], 'group')}; "
        f"{count(epochs['large_batch'], 'epoch')} of large batches, "
        f"{epochs['refine']} of refinement per group"
    )


def _rows(result: dict[str, Any], figures: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the name and the value of each row.

    Args:
        result: the run's.
        figures: one metric of all models, or the loss.
    """
    rows = [("end of phase 1 (large batch)", figures["large_batch"])]
    if "large_batch_ema" in figures:
        rows.append(("end of phase 1, moving average (EMA)", figures["large_batch_ema"]))
    if not figures["groups"]:
        return rows
    names = _names(result)
    rows += zip(names, figures["groups"], strict=True)
    if "groups_ema" in figures:
        averages = [f"{name}, moving average (EMA)" for name in names]
        rows += zip(averages, figures["groups_ema"], strict=True)
    before, after = "mean of groups (before averaging)", "**averaged (SWAP)**"
    return [*rows, (before, figures["mean_of_groups"]), (after, figures["averaged"])]


def _names(result: dict[str, Any]) -> list[str]:
    """Return the names of the groups' rows, one for each group and cycle."""
    cycles = range(1, result["cycles"] + 1)
    groups = range(result["groups"])
    if len(cycles) == 1:
        return [f"group {group}" for group in groups]
    return [f"group {group}, cycle {cycle}" for group in groups for cycle in cycles]


def _column(result: dict[str, Any], split: str, name: str) -> list[str]:
    """Return the cells of a metric on a split, or of the loss, for the models of `_rows`."""
    values = [value for _, value in _rows(result, result[f"{split}_{name}"])]
    if name == "loss":
        return ["-" if value is None else f"{value:.4f}" for value in values]
    return [shown(name, value) for value in values]


def write_report(run: Path) -> Path:
    """Write `report.md`, its figures, and one page with all of it, `report.html`, into the folder.

    The run need not be complete.

    Returns:
        The path of `report.md`.

    Raises:
        UserError: the folder holds no run.
    """
    result = load_run(run)
    curves = run / "curves.png"
    draw_curves(run, curves)
    redrawn = _redraw(run)
    text = f"# {run.resolve().name}\n\n{table(result)}\n\n"
    text += f"![{metric_names(result)[0]} and learning rate]({curves.name})\n"
    text += "".join(f"\n![{figure.stem}]({figure.name})\n" for figure in redrawn)
    write_text(run / "report.md", text)
    write_text(run / "report.html", _page(run, text, [curves, *redrawn]))
    return run / "report.md"


def _redraw(run: Path) -> list[Path]:
    """Draw the figures whose numbers are in a run's JSON files, and return their paths."""
    figures = []
    for name, draw in (("landscape", draw_landscape), ("trajectory", draw_trajectory)):
        numbers, figure = run / f"{name}.json", run / f"{name}.png"
        if numbers.is_file():
            draw(json.loads(numbers.read_text(encoding="utf-8")), figure)
            figures.append(figure)
    return figures


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse }
td, th { padding: .2rem .8rem; border-bottom: 1px solid #ccc; text-align: right }
td:first-child, th:first-child { text-align: left }
img { max-width: 100% }
pre { background: #f4f4f4; padding: 1rem; overflow: auto }
"""


def _page(run: Path, text: str, figures: Sequence[Path]) -> str:
    """Return `report.md` as HTML that needs no other file, with the recipe and the environment."""
    body = MarkdownIt("commonmark").enable("table").render(text)
    for figure in figures:
        image = base64.b64encode(figure.read_bytes()).decode()
        body = body.replace(f'src="{figure.name}"', f'src="data:image/png;base64,{image}"')
    for file in ("recipe.toml", "environment.json"):
        if (run / file).is_file():
            content = html.escape((run / file).read_text(encoding="utf-8", errors="replace"))
            body += f"<details><summary>{file}</summary><pre>{content}</pre></details>\n"
    title = html.escape(run.resolve().name)
    return (
        '<!doctype html>\n<html lang="en">\n'
        f'<head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>\n'
        f"<body>\n{body}</body>\n</html>\n"
    )
