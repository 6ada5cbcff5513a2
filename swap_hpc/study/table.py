"""A study's folder -> its table and figure. Imports neither torch nor MPI."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from swap_hpc.parallel.atomic import write_json, write_text
from swap_hpc.recipe.markdown import markdown_table
from swap_hpc.recipe.schema import Recipe
from swap_hpc.study.figures import drawn
from swap_hpc.study.study import Model, Plan


@dataclass(frozen=True)
class Line:
    """A row of the table: what its seeds gave."""

    method: str
    rate: float | None
    epochs: str
    workers: int  # groups, where the row has refined copies; else ranks
    ranks: int
    accuracy: dict[int, float] = field(default_factory=dict)  # by seed, fractions
    seconds: dict[int, float] = field(default_factory=dict)  # as run on `ranks`
    parallel_seconds: dict[int, float] = field(
        default_factory=dict
    )  # computed: with a rank for each group


@dataclass(frozen=True)
class Difference:
    """Of two rows' accuracies, seed by seed."""

    first: str
    second: str
    points: float  # mean, percentage points
    half_width: float | None  # of the 95 % interval (Student's t); None with one seed
    seeds: int


def lines(plan: Plan) -> list[Line]:
    """The table's rows, of the runs that are complete."""
    trials = plan.reported()
    rows = []
    for row in plan.study.rows:
        mine = [
            (trial, result)
            for trial in trials
            if trial.name == row.run and (result := trial.result)
        ]
        recipe, ranks = next(
            (trial.recipe, trial.ranks) for trial in trials if trial.name == row.run
        )
        refines = recipe.refine.epochs > 0 and row.model != "large_batch"
        line = Line(
            row.method,
            plan.rate(row.run),
            _epochs(
                _phase_1(recipe, [result for _, result in mine]),
                recipe.refine.epochs if refines else 0,
                recipe.refine.cycles,
            ),
            max(recipe.groups, ranks) if refines else ranks,
            ranks,
        )
        for trial, result in mine:
            in_turn = max(1, recipe.groups // trial.ranks)
            line.accuracy[trial.recipe.seed] = result["test_accuracy"][row.model]
            line.seconds[trial.recipe.seed] = _seconds(result, row.model, 1)
            line.parallel_seconds[trial.recipe.seed] = _seconds(result, row.model, in_turn)
        rows.append(line)
    return rows


def _epochs(large_batch: str, refine: int, cycles: int) -> str:
    return (
        large_batch
        + (f" + {refine}" if refine else "")
        + (f" x {cycles}" if refine and cycles > 1 else "")
    )


def _phase_1(recipe: Recipe, results: Sequence[dict[str, Any]]) -> str:
    """Epochs of phase 1: those that were run, their mean over the seeds; before there are any, the most that may be."""
    run = [result["epochs"]["large_batch"] for result in results]
    return f"{mean(run):.4g}" if run else f"{recipe.large_batch.epochs}"


def _seconds(result: dict[str, Any], model: Model, in_turn: int) -> float:
    """Of training, data loading in, evaluation and saving out; `in_turn`: groups that a rank refined one after the other."""
    seconds = result["seconds"]
    phases = {"large_batch": ("large_batch",), "mean_of_groups": ("large_batch", "refine")}
    named = phases.get(model, ("large_batch", "refine", "average", "batchnorm"))
    return sum(seconds[phase] / (in_turn if phase == "refine" else 1) for phase in named)


def differences(plan: Plan, table: Sequence[Line]) -> Iterator[Difference]:
    by_method = {line.method: line.accuracy for line in table}
    for first, second in plan.study.differences:
        one, other = by_method[first], by_method[second]
        points = [100 * (one[seed] - other[seed]) for seed in one if seed in other]
        if points:
            yield Difference(first, second, mean(points), _half_width(points), len(points))


def _half_width(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    from scipy.stats import t  # type: ignore[import-untyped]

    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def text(plan: Plan) -> str:
    """The study as Markdown: its table, the differences, the search."""
    study, table = plan.study, lines(plan)
    computed = any(line.workers > line.ranks for line in table)
    head = [
        "method",
        "epochs",
        "workers",
        "test accuracy %",
        "seconds" + (" on " + _ranks(table) if computed else ""),
    ]
    head += ["seconds with a rank per worker"] if computed else []
    rows: list[Sequence[str]] = []
    for line in table:
        cells = [
            line.method,
            line.epochs,
            str(line.workers),
            spread([100 * a for a in line.accuracy.values()], 2),
        ]
        cells += [spread([*line.seconds.values()], 0)]
        if computed:
            star = " (computed)" if line.workers > line.ranks else ""
            cells += [spread([*line.parallel_seconds.values()], 0) + star]
        rows.append(cells)
    parts = [f"# {study.title}", _seeds(table), markdown_table(head, rows)]
    if computed:
        parts.append(
            "Seconds are of training: data loading in, evaluation and saving out. Computed: phase 1 and the average as measured, "
            "phase 2 divided by the number of groups that a rank refined in turn."
        )
    if gaps := [*differences(plan, table)]:
        rows = [
            (f"{gap.first} - {gap.second}", f"{gap.points:+.2f}", _interval(gap)) for gap in gaps
        ]
        parts += [
            "## Differences",
            markdown_table(("accuracy", "points, mean", "95 % interval (paired by seed)"), rows),
        ]
    if study.search:
        parts += ["## Search of the learning rate", _search(plan)]
    parts += [study.note] if study.note else []
    return "\n\n".join(parts) + "\n"


def _ranks(table: Sequence[Line]) -> str:
    return " or ".join(map(str, sorted({line.ranks for line in table}))) + " ranks"


def _seeds(table: Sequence[Line]) -> str:
    counts = sorted({len(line.accuracy) for line in table})
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Mean and standard deviation over {number} seed{'s' if counts[-1] != 1 else ''}."


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation; one value as it is; a dash for none."""
    if not values:
        return "-"
    middle = f"{mean(values):,.{digits}f}"
    return f"{middle} ± {stdev(values):,.{digits}f}" if len(values) > 1 else middle


def _interval(gap: Difference) -> str:
    if gap.half_width is None:
        return "one seed"
    return f"{gap.points - gap.half_width:+.2f} to {gap.points + gap.half_width:+.2f}"


def _search(plan: Plan) -> str:
    """Accuracies on the validation samples, by run and rate; the chosen rate's is bold."""
    rows = []
    for name, run in plan.study.runs.items():
        if len(run.rates) < 2:
            continue
        found = [(rate, plan.accuracy(name, rate)) for rate in run.rates]
        best = plan.rate(name)
        said = [(rate, f"{100 * a:.2f}" if math.isfinite(a) else "diverged") for rate, a in found]
        cells = [
            f"{rate:g}: **{text}**" if rate == best else f"{rate:g}: {text}" for rate, text in said
        ]
        edge = "yes" if best in (min(run.rates), max(run.rates)) else "no"
        rows.append((name, ", ".join(cells), edge))
    return markdown_table(
        ("run", "rate: accuracy % on validation samples", "best at the range's edge"), rows
    )


def write(plan: Plan) -> Path:
    """Writes `study.md`, `study.json` and `study.png` into the study's folder."""

    table = lines(plan)
    write_text(plan.out / "study.md", text(plan) + "\n![accuracy of every row](study.png)\n")
    content: dict[str, Any] = {"title": plan.study.title, "rows": [asdict(line) for line in table]}
    content["differences"] = [asdict(gap) for gap in differences(plan, table)]
    content["rates"] = {name: plan.rate(name) for name in plan.study.runs}
    write_json(plan.out / "study.json", content)
    figure(plan.study.title, table, plan.out / "study.png")
    return plan.out / "study.md"


def figure(title: str, table: Sequence[Line], file: Path) -> None:
    """Draws the accuracy of every seed of every row, and each row's mean and standard deviation, against its seconds."""
    with drawn(
        file, title, 1, 2, (11, 0.9 + 0.55 * max(5, len(table))), width_ratios=(1.2, 1)
    ) as axes:
        _draw(table, *axes[0])


def _draw(table: Sequence[Line], left: Any, right: Any) -> None:
    for place, line in enumerate(table):
        values, colour = [100 * a for a in line.accuracy.values()], f"C{place}"
        if not values:
            continue
        left.plot(values, [place] * len(values), "o", color=colour, alpha=0.45, ms=5, mew=0)
        bar = {"xerr": stdev(values)} if len(values) > 1 else {}
        left.errorbar(mean(values), place, fmt="|", color=colour, ms=16, capsize=4, **bar)
        right.plot(
            mean(line.parallel_seconds.values()), mean(values), "o", color=colour, label=line.method
        )
    left.set_yticks(range(len(table)), [line.method for line in table])
    left.invert_yaxis()
    left.set(xlabel="test accuracy (%)", title="each seed, mean and standard deviation")
    right.set(
        xlabel="seconds of training, a rank per worker",
        ylabel="test accuracy (%)",
        title="accuracy against time",
        xlim=(0, None),
    )
    left.grid(axis="x", alpha=0.3)
    right.grid(alpha=0.3)
    right.legend(fontsize="x-small")
