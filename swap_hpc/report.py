"""The files of a run -> tables and figures. Imports neither torch nor MPI."""

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swap_hpc import figures
from swap_hpc.figures import load_run


@dataclass(frozen=True)
class Table:
    """Cells of text; a bold row stands between asterisks."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def table(result: dict[str, Any]) -> str:
    """A result as a Markdown table: the accuracies, then the seconds of each phase where the run is complete."""
    head, *parts = _parts(result)
    return "\n\n".join([str(head), *(markdown(part.head, part.rows) if isinstance(part, Table) else part for part in parts)])


def _parts(result: dict[str, Any]) -> list[str | Table]:
    """Paragraphs and tables."""
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
    shown = [(name, f"{100 * a:.2f}" if a is not None else "-", f"{b:.4f}" if b is not None else "-") for name, a, b in rows]
    head = f"{result['recipe']}, seed {result['seed']}: {result['ranks'] or 'some'} ranks, {result['groups']} groups"
    epochs = f"{result['epochs']['large_batch']} epochs of large batches, {result['epochs']['refine']} of refinement per group"
    parts: list[str | Table] = [f"{head}; {epochs}", Table(("model", "test accuracy %", "test loss"), shown)]
    if seconds:
        parts += ["seconds (the slowest rank's):", Table(tuple(seconds), [tuple(f"{s:.1f}" for s in seconds.values())])]
    if "state" in result:
        parts.append(f"not complete: {result['state']}")
    return parts


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_report(run: Path) -> Path:
    """Writes `report.md`, its figures, and all of it as one page `report.html` into a run's folder, complete or not.

    Returns the first one's path. Raises UserError where the folder holds no run.
    """
    result = load_run(run)
    drawn = [run / "curves.png", *figures.redraw(run)]
    figures.curves(run, drawn[0])
    text = f"# {run.name}\n\n{table(result)}\n\n![accuracy and learning rate](curves.png)\n"
    text += "".join(f"\n![{figure.stem}]({figure.name})\n" for figure in drawn[1:])
    figures.put(run / "report.md", text)
    figures.put(run / "report.html", _page(run, _parts(result), drawn))
    return run / "report.md"


STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ccc; text-align: right }
td:first-child, th:first-child { text-align: left } img { max-width: 100% } pre { background: #f4f4f4; padding: 1rem; overflow: auto }"""


def _page(run: Path, parts: Sequence[str | Table], drawn: Sequence[Path]) -> str:
    """HTML that needs no other file."""
    name = html.escape(run.resolve().name)
    body = [f"<h1>{name}</h1>", *(_html_table(part) if isinstance(part, Table) else f"<p>{html.escape(part)}</p>" for part in parts)]
    for figure in drawn:
        image = base64.b64encode(figure.read_bytes()).decode()
        body.append(f'<p><img alt="{figure.stem}" src="data:image/png;base64,{image}"></p>')
    for file in ("recipe.toml", "environment.json"):
        if (run / file).is_file():
            text = html.escape((run / file).read_text(encoding="utf-8", errors="replace"))
            body.append(f"<details><summary>{file}</summary><pre>{text}</pre></details>")
    head = f'<meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body>\n</html>\n"


def _html_table(table: Table) -> str:
    rows = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in table.head)}</tr>"]
    for row in table.rows:
        style = ' style="font-weight: bold"' if row[0].startswith("**") else ""
        cells = "".join(f"<td>{html.escape(cell.strip('*'))}</td>" for cell in row)
        rows.append(f"<tr{style}>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"
