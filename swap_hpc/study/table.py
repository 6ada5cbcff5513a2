"""The table of a study: as Markdown, and with its numbers and its figure in files.

Imports neither torch nor MPI.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from swap_hpc.parallel.atomic import write_json, write_text
from swap_hpc.recipe.markdown import markdown_table
from swap_hpc.recipe.metrics import SHARES, heading, scale, shown
from swap_hpc.recipe.wording import bit_rate
from swap_hpc.study.figures.methods import draw_methods
from swap_hpc.study.figures.networks import draw_over_networks, draw_rates
from swap_hpc.study.networks import Crossing, Timing, crossings, timings
from swap_hpc.study.numbers import Difference, Line, differences, lines
from swap_hpc.study.plan import Plan

ABOUT_SECONDS = (
    "Seconds are of training: data loading in, evaluation and saving out. Computed: phase 1 and "
    "the average as measured, phase 2 divided by the number of groups that a rank refined in turn."
)


NETWORKS_FIGURE = "networks.png"


ABOUT_NETWORKS = (
    "Seconds are of training, with the standard error of their mean. Over {first} all epochs ran. "
    "*In italics*: {epochs} epochs of each phase ran, with one seed; the seconds are those of all "
    "epochs at the mean of these but the first. A row on one rank sends nothing."
)


def write(plan: Plan) -> list[Path]:
    """Write `study.md`, `study.json` and `study.png` into the study's folder.

    Where networks are compared, `networks.png` too.

    Returns:
        The paths of the files.
    """
    plan = plan.for_report()
    study, table = plan.study, lines(plan)
    over = timings(plan, table)
    figures = f"\n![{plan.metric.key} of every row](study.png)\n"
    if plan.networks:
        figures += f"\n![seconds against the network's rate]({NETWORKS_FIGURE})\n"
    write_text(plan.out / "study.md", text(plan) + figures)
    content: dict[str, Any] = {
        "title": study.title,
        "rows": [_named(asdict(line), plan.metric.key) for line in table],
        "differences": [asdict(gap) for gap in differences(plan, table)],
        "rates": {name: plan.rate(name) for name in study.runs},
    }
    if plan.networks:
        content["networks"] = {name: study.networks[name] for name in plan.networks}
        content["seconds_over"] = {
            method: {network: asdict(timing) for network, timing in by_network.items()}
            for method, by_network in over.items()
        }
        content["crossings"] = [asdict(each) for each in crossings(plan, over)]
    write_json(plan.out / "study.json", content)
    before = {row.method for row in study.rows if row.model == "mean_of_groups"}
    written = [plan.out / f"study.{suffix}" for suffix in ("md", "json", "png")]
    if not plan.networks:
        draw_methods(study.title, table, before, plan.metric.key, written[-1])
        return written
    draw_over_networks(study.title, table, over, plan.metric.key, written[-1])
    written.append(plan.out / NETWORKS_FIGURE)
    draw_rates(study.title, study.networks, over, [*crossings(plan, over)], written[-1])
    return written


def _named(line: dict[str, Any], metric: str) -> dict[str, Any]:
    """Return a row with its values under the metric's name."""
    return {metric if key == "values" else key: value for key, value in line.items()}


def text(plan: Plan) -> str:
    """Return the study as Markdown: its table, the differences, the search, the note."""
    plan = plan.for_report()
    study, table = plan.study, lines(plan)
    computed = any(line.workers > line.ranks for line in table)
    parts = [
        f"# {study.title}",
        _seeds(table, study.timed_seeds),
        _rows(table, plan.metric.key, computed),
    ]
    if computed:
        parts.append(ABOUT_SECONDS)
    if plan.networks:
        over = timings(plan, table)
        parts += ["## Seconds over each network", _seconds_over(plan, over)]
        parts.append(ABOUT_NETWORKS.format(first=plan.networks[0], epochs=study.timed_epochs))
        if crossed := [*crossings(plan, over)]:
            parts.append(_crossings(crossed))
    if gaps := [*differences(plan, table)]:
        parts += ["## Differences", _differences(gaps, plan.metric.key)]
    if study.search:
        parts += ["## Search of the learning rate", _search(plan)]
    if study.note:
        parts.append(study.note)
    return "\n\n".join(parts) + "\n"


def _seeds(table: Sequence[Line], timed: Sequence[int]) -> str:
    counts = sorted({len(line.values) for line in table})
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    told = f"Mean and standard deviation over {number} seed{'s' * (counts[-1] != 1)}."
    if timed:
        told += f" Seconds are those of seed{'s' * (len(timed) > 1)} {', '.join(map(str, timed))}."
    return told


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


def _seconds_over(plan: Plan, over: Mapping[str, Mapping[str, Timing]]) -> str:
    rates = plan.study.networks
    head = ("method", *(f"{name} ({bit_rate(1e6 * rates[name])})" for name in plan.networks))
    rows = [
        (method, *(_timing(by_network.get(network)) for network in plan.networks))
        for method, by_network in over.items()
    ]
    return markdown_table(head, rows)


def _timing(timing: Timing | None) -> str:
    """Return seconds and their standard error in percent, in italics unless all epochs ran."""
    if timing is None:
        return "-"
    error = f" (± {100 * timing.error:.1f} %)" if timing.error is not None else ""
    seconds = f"{timing.seconds:,.0f}{error}"
    return seconds if timing.complete else f"*{seconds}*"


def _crossings(crossed: Sequence[Crossing]) -> str:
    head = ("rows", "which takes less time")
    return markdown_table(head, [(f"{c.first}, {c.second}", _faster(c)) for c in crossed])


def _faster(crossing: Crossing) -> str:
    if crossing.megabits is None:
        return f"{crossing.faster_below}, over each network"
    return f"{crossing.faster_below}, below {bit_rate(1e6 * crossing.megabits)}"


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
