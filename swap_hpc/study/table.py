"""The table of a study: as Markdown, and with its numbers and its figure in files.

Imports neither torch nor MPI.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from swap_hpc.parallel.atomic import write_json, write_text
from swap_hpc.recipe.markdown import markdown_table
from swap_hpc.recipe.metrics import SHARES, heading, scale, shown
from swap_hpc.study.figures.methods import draw_methods
from swap_hpc.study.numbers import Difference, Line, differences, lines
from swap_hpc.study.plan import Plan

ABOUT_SECONDS = (
    "Seconds are of training: data loading in, evaluation and saving out. Computed: phase 1 and "
    "the average as measured, phase 2 divided by the number of groups that a rank refined in turn."
)


def write(plan: Plan) -> Path:
    """Write `study.md`, `study.json` and `study.png` into the study's folder.

    Returns:
        The path of `study.md`.
    """
    study, table = plan.study, lines(plan)
    figure = f"\n![{plan.metric.key} of every row](study.png)\n"
    write_text(plan.out / "study.md", text(plan) + figure)
    content: dict[str, Any] = {
        "title": study.title,
        "rows": [_named(asdict(line), plan.metric.key) for line in table],
        "differences": [asdict(gap) for gap in differences(plan, table)],
        "rates": {name: plan.rate(name) for name in study.runs},
    }
    write_json(plan.out / "study.json", content)
    before = {row.method for row in study.rows if row.model == "mean_of_groups"}
    draw_methods(study.title, table, before, plan.metric.key, plan.out / "study.png")
    return plan.out / "study.md"


def _named(line: dict[str, Any], metric: str) -> dict[str, Any]:
    """Return a row with its values under the metric's name."""
    return {metric if key == "values" else key: value for key, value in line.items()}


def text(plan: Plan) -> str:
    """Return the study as Markdown: its table, the differences, the search, the note."""
    study, table = plan.study, lines(plan)
    computed = any(line.workers > line.ranks for line in table)
    parts = [f"# {study.title}", _seeds(table), _rows(table, plan.metric.key, computed)]
    if computed:
        parts.append(ABOUT_SECONDS)
    if gaps := [*differences(plan, table)]:
        parts += ["## Differences", _differences(gaps, plan.metric.key)]
    if study.search:
        parts += ["## Search of the learning rate", _search(plan)]
    if study.note:
        parts.append(study.note)
    return "\n\n".join(parts) + "\n"


def _seeds(table: Sequence[Line]) -> str:
    counts = sorted({len(line.values) for line in table})
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Mean and standard deviation over {number} seed{'s' * (counts[-1] != 1)}."


def _rows(table: Sequence[Line], metric: str, computed: bool) -> str:
    """Return the table; `computed` adds the column of seconds with a rank per worker."""
    head = ["method", "epochs", "workers", f"test {heading(metric)}", "seconds"]
    if computed:
        head[-1] += " on " + _ranks(table)
        head.append("seconds with a rank per worker")
    rows = []
    for line in table:
        values = [scale(metric) * value for value in line.values.values()]
        seconds = spread([*line.seconds.values()], ",.0f")
        shown_values = spread(values, _form(metric))
        cells = [line.method, line.epochs, str(line.workers), shown_values, seconds]
        if computed:
            note = " (computed)" if line.workers > line.ranks else ""
            cells.append(spread([*line.parallel_seconds.values()], ",.0f") + note)
        rows.append(cells)
    return markdown_table(head, rows)


def _ranks(table: Sequence[Line]) -> str:
    numbers = sorted({line.ranks for line in table})
    return " or ".join(map(str, numbers)) + f" rank{'s' * (numbers[-1] != 1)}"


def spread(values: Sequence[float], form: str) -> str:
    """Return mean and standard deviation as text; one value as it is, a dash for none."""
    if not values:
        return "-"
    middle = f"{mean(values):{form}}"
    if not all(map(math.isfinite, values)):
        return middle  # for which statistics.stdev fails
    return f"{middle} ± {stdev(values):{form}}" if len(values) > 1 else middle


def _differences(gaps: Sequence[Difference], metric: str) -> str:
    mean_of = "points, mean" if metric in SHARES else "mean"
    head = (metric, mean_of, "95 % interval (paired by seed)")
    form = _form(metric)
    rows = [
        (f"{gap.first} - {gap.second}", f"{gap.points:+{form}}", _interval(gap, form))
        for gap in gaps
    ]
    return markdown_table(head, rows)


def _form(metric: str) -> str:
    """Return the format of a metric: two decimals of percent, or six digits."""
    return ".2f" if metric in SHARES else ".6g"


def _interval(gap: Difference, form: str) -> str:
    if gap.half_width is None:
        return "one seed"
    low, high = gap.points - gap.half_width, gap.points + gap.half_width
    return f"{low:+{form}} to {high:+{form}}"


def _search(plan: Plan) -> str:
    """Return the metric on the validation samples, by run and rate, the chosen one bold."""
    metric = plan.metric.key
    head = ("run", f"rate: {heading(metric)} on validation samples", "best at the range's edge")
    rows = []
    for name, run in plan.study.runs.items():
        if len(run.rates) < 2:
            continue
        best = plan.rate(name)
        cells = []
        for rate in run.rates:
            value = plan.found(name, rate)
            text = shown(metric, value) if math.isfinite(value) else "diverged"
            cells.append(f"{rate:g}: **{text}**" if rate == best else f"{rate:g}: {text}")
        edge = "yes" if best in (min(run.rates), max(run.rates)) else "no"
        rows.append((name, ", ".join(cells), edge))
    return markdown_table(head, rows)
