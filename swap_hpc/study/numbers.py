"""The numbers of a study's table, from the results of its runs. Imports neither torch nor MPI."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from swap_hpc.recipe.metrics import scale
from swap_hpc.recipe.schema import Recipe
from swap_hpc.study.plan import Plan
from swap_hpc.study.study import OF_PHASE_1, Model, Row
from swap_hpc.study.trial import Trial


@dataclass(frozen=True)
class Line:
    """A row of the table: the results of all seeds of one method."""

    method: str
    rate: float | None
    epochs: str
    workers: int
    """Groups, where the row shows refined models; else ranks."""
    ranks: int
    values: dict[int, float] = field(default_factory=dict)
    """The main metric on the test split, by seed; accuracies are fractions."""
    seconds: dict[int, float] = field(default_factory=dict)
    """Of training, as run on `ranks` ranks, by seed; of timed seeds only."""
    parallel_seconds: dict[int, float] = field(default_factory=dict)
    """Of training, computed for one rank per group, by seed; of timed seeds only."""


@dataclass(frozen=True)
class Difference:
    """The main metric of one row less that of another, paired by seed."""

    first: str
    second: str
    points: float
    """The mean; of an accuracy in percentage points."""
    half_width: float | None
    """Half of the 95 % confidence interval (Student's t); None with one seed."""
    seeds: int


def lines(plan: Plan) -> list[Line]:
    """Return the table's rows, made of the runs that are complete."""
    trials = plan.reported()
    return [_line(plan, row, [t for t in trials if t.name == row.run]) for row in plan.study.rows]


def _line(plan: Plan, row: Row, trials: Sequence[Trial]) -> Line:
    recipe, ranks = trials[0].recipe, trials[0].ranks
    complete = [(trial, result) for trial in trials if (result := trial.result)]
    refines = recipe.refine.epochs > 0 and row.model not in OF_PHASE_1
    line = Line(
        method=row.method,
        rate=plan.rate(row.run),
        epochs=_epochs(recipe, [result for _, result in complete], refines),
        workers=max(recipe.groups, ranks) if refines else ranks,
        ranks=ranks,
    )
    for trial, result in complete:
        seed = trial.recipe.seed
        line.values[seed] = result[f"test_{plan.metric.key}"][row.model]
        if not trial.is_timed:
            continue
        # groups that a rank refined one after the other
        in_turn = max(1, recipe.groups // trial.ranks)
        line.seconds[seed] = _seconds(result, row.model, 1)
        line.parallel_seconds[seed] = _seconds(result, row.model, in_turn)
    return line


def _epochs(recipe: Recipe, results: Sequence[dict[str, Any]], refines: bool) -> str:
    """Return the epochs of each phase, as "12 + 4", with the cycles where there are several."""
    large_batch = _epochs_of_phase_1(recipe, results)
    if not refines:
        return large_batch
    cycles = recipe.refine.cycles
    times = f" x {cycles}" if cycles > 1 else ""
    return f"{large_batch} + {recipe.refine.epochs}{times}"


def _epochs_of_phase_1(recipe: Recipe, results: Sequence[dict[str, Any]]) -> str:
    """Return the mean over the seeds; before any has run, the most that the recipe allows."""
    run = [result["epochs"]["large_batch"] for result in results]
    return f"{mean(run):.4g}" if run else f"{recipe.large_batch.epochs}"


# The phases that it takes to make a model.
_PHASES: dict[Model, tuple[str, ...]] = {
    "large_batch": ("large_batch",),
    "large_batch_ema": ("large_batch",),
    "mean_of_groups": ("large_batch", "refine"),
    "averaged": ("large_batch", "refine", "average", "batchnorm"),
}


def _seconds(result: dict[str, Any], model: Model, in_turn: int) -> float:
    """Return the seconds of training, including data loading, without evaluation and saving.

    Args:
        result: what `result.json` holds.
        model: the model that was made.
        in_turn: the number by which the seconds of phase 2 are divided.
    """
    shares = {"refine": in_turn}
    return sum(seconds_of(result, phase) / shares.get(phase, 1) for phase in _PHASES[model])


def seconds_of(result: dict[str, Any], phase: str) -> float:
    """Return the seconds of a phase, without evaluation and saving."""
    return float(result["seconds"][phase])


def shown_phases(model: Model) -> tuple[str, ...]:
    """Return the phases that it takes to make a model."""
    return _PHASES[model]


def differences(plan: Plan, table: Sequence[Line]) -> Iterator[Difference]:
    """Yield the differences that the study asks for, over the seeds that both rows have."""
    by_method = {line.method: line.values for line in table}
    factor = scale(plan.metric.key)
    for first, second in plan.study.differences:
        one, other = by_method[first], by_method[second]
        seeds = [seed for seed in one if seed in other]
        if seeds:
            points = mean(factor * (one[seed] - other[seed]) for seed in seeds)
            half_width = _half_width(
                [factor * one[seed] for seed in seeds], [factor * other[seed] for seed in seeds]
            )
            yield Difference(first, second, points, half_width, len(seeds))


def _half_width(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Return half of the interval of the difference."""
    if len(ours) < 2:
        return None
    # scipy takes a second to import
    from scipy.stats import ttest_rel  # type: ignore[import-untyped]

    with warnings.catch_warnings():
        # equal differences: the test statistic is unreliable then, but the width is right, 0
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = ttest_rel(ours, theirs).confidence_interval(0.95)
    return float(high - low) / 2
