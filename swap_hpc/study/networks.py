"""The seconds of a study's rows over several networks, and where one row overtakes another.

Imports neither torch nor MPI.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from swap_hpc.study.numbers import Line, seconds_of, shown_phases
from swap_hpc.study.plan import Plan
from swap_hpc.study.study import Row
from swap_hpc.study.trial import Trial


@dataclass(frozen=True)
class Timing:
    """The seconds of a row over one network."""

    seconds: float
    """Of training: the mean over seeds where all epochs ran, else computed from those that did."""
    error: float | None
    """Standard error of the mean as a share of it; None with one value."""
    complete: bool
    """All epochs ran over this network, or the row runs on one rank, to which it means nothing."""


@dataclass(frozen=True)
class Crossing:
    """The rate of a network below which one row takes less time than another."""

    first: str
    second: str
    megabits: float | None
    """None: one of them is faster over all networks that were measured."""
    faster_below: str
    """The row that is faster below that rate; without one, the row that is faster everywhere."""


def timings(plan: Plan, table: Sequence[Line]) -> dict[str, dict[str, Timing]]:
    """Return the seconds of each row, by its method and by network, as far as they are known."""
    timed = {(trial.name, trial.network.name): trial for trial in plan.timed() if trial.network}
    found: dict[str, dict[str, Timing]] = {}
    for row, line in zip(plan.study.rows, table, strict=True):
        found[line.method] = {}
        for network in plan.networks:
            trial = timed.get((row.run, network))
            timing = _timed(plan, row, trial) if trial else _measured(line)
            if timing:
                found[line.method][network] = timing
    return found


def _measured(line: Line) -> Timing | None:
    values = [*line.seconds.values()]
    return Timing(mean(values), _error(values), complete=True) if values else None


def _timed(plan: Plan, row: Row, trial: Trial) -> Timing | None:
    """Return the seconds of all epochs of a row, from those of a trial's epochs."""
    result = trial.result
    if result is None:
        return None
    whole = plan.reported_recipe(row.run)
    longer = whole.refine.epochs * whole.refine.cycles / max(1, trial.recipe.refine.epochs)
    # What is done again and again on the way, beside the epochs themselves.
    on_the_way: set[str] = set()
    if whole.refine.average_every_steps:
        on_the_way |= {"refine", "average"}
    if whole.refine.evaluate_average:
        on_the_way |= {"refine", "average", "batchnorm"}
    parts: list[tuple[float, float]] = []  # seconds, and their standard error
    for phase in shown_phases(row.model):
        if phase == "large_batch":
            parts.append(_of_epochs(trial.folder, phase, _epochs_of_phase_1(plan, row)))
        elif phase in on_the_way:
            # Groups wait for each other at their sync points, which epochs' seconds leave out.
            parts.append((seconds_of(result, phase) * longer, 0.0))
        elif phase == "refine":
            in_turn = max(1, whole.groups // trial.ranks)  # groups that a rank refines
            epochs = whole.refine.epochs * whole.refine.cycles * in_turn
            parts.append(_of_epochs(trial.folder, phase, epochs))
        else:
            parts.append((seconds_of(result, phase), 0.0))
    seconds = sum(part for part, _ in parts)
    error = sqrt(sum(error**2 for _, error in parts)) / seconds
    return Timing(seconds, error or None, complete=False)


def _epochs_of_phase_1(plan: Plan, row: Row) -> float:
    """Return how many epochs phase 1 took with the timed seeds; before any run, the most allowed.

    `stop_accuracy` may end it early, over any network after the same epoch.
    """
    timed = [trial for trial in plan.reported(plan.timed_seeds) if trial.name == row.run]
    results = [trial.result for trial in timed]
    epochs = [result["epochs"]["large_batch"] for result in results if result]
    return mean(epochs) if epochs else plan.reported_recipe(row.run).large_batch.epochs


def _of_epochs(run: Path, phase: str, epochs: float) -> tuple[float, float]:
    """Return the seconds of so many epochs like those of a run, and their standard error."""
    values = _epoch_seconds(run, phase)
    seconds = epochs * mean(values) if values else 0.0
    return seconds, seconds * (_error(values) or 0.0)


def _epoch_seconds(run: Path, phase: str) -> list[float]:
    """Return the seconds of a phase's epochs but the first, those of the slowest group."""
    by_group: dict[int | None, list[float]] = {}
    for file in sorted((run / "metrics").glob("*.jsonl")):
        for text in file.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if line.get("phase") == phase and "train_seconds" in line:
                by_group.setdefault(line["group"], []).append(line["train_seconds"])
    # In the first epoch buffers are made and files are read for the first time.
    kept = [values[1:] or values for values in by_group.values()]
    return max(kept, key=mean, default=[])


def _error(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean, as a share of it."""
    if len(values) < 2:
        return None
    return stdev(values) / sqrt(len(values)) / mean(values)


def crossings(plan: Plan, found: Mapping[str, Mapping[str, Timing]]) -> Iterator[Crossing]:
    """Yield where the rows cross that the study compares.

    Between two networks, seconds are linear in the time that a bit takes: the reciprocal of the
    rate.
    """
    for first, second in plan.study.differences:
        shared = [network for network in found[first] if network in found[second]]
        points = sorted(
            (
                1 / plan.study.networks[network],
                found[first][network].seconds - found[second][network].seconds,
            )
            for network in shared
        )
        if points:
            yield from _crossings(first, second, points)


def _crossings(
    first: str, second: str, points: Sequence[tuple[float, float]]
) -> Iterator[Crossing]:
    """Yield where a difference of seconds changes its sign.

    Args:
        first: the row whose seconds are the larger ones where the difference is above zero.
        second: the other row.
        points: the time of a bit, ascending, and the difference of seconds.
    """
    changes = False
    for (fast, before), (slow, after) in pairwise(points):
        if (before < 0) != (after < 0):
            changes = True
            place = fast + (slow - fast) * before / (before - after)
            yield Crossing(first, second, 1 / place, first if after < 0 else second)
    if not changes:
        yield Crossing(first, second, None, first if points[0][1] < 0 else second)
