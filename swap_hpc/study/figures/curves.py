"""The figure of a run: its main metric and the learning rate against epochs."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from swap_hpc.recipe.loading import load_recipe
from swap_hpc.recipe.metrics import axis_label, scale
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.training import LargeBatch, Refine
from swap_hpc.run.folder import Lines, load_run, read_lines
from swap_hpc.study.figures.labels import Label, label_right, place_labels
from swap_hpc.study.figures.style import (
    GROUPS,
    LARGE_BATCH,
    SWAP,
    count_epochs,
    figure_in,
    mark_phases,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = tuple[list[float], list[float]]  # x and y


@dataclass(frozen=True)
class _Run:
    """What the figure shows of a run."""

    recipe: Recipe
    result: dict[str, Any]
    large_batch: Lines
    groups: list[Lines]  # those that have begun
    averages: Lines  # evaluations of the averaged model during phase 2

    @property
    def metric(self) -> str:
        """The name of the main metric."""
        return self.recipe.metric_names[0]

    @property
    def split(self) -> str:
        """The split that epochs are evaluated on."""
        return "validation" if "validation_loss" in self.result else "test"

    @property
    def ends(self) -> dict[str, float | None]:
        """The main metric after phase 1, before averaging and after, as it is shown.

        None where there is no such model yet, or the metric is not finite.
        """
        found = self.result[f"{self.split}_{self.metric}"]
        names = ("large_batch", "mean_of_groups", "averaged")
        return {name: _shown(found[name], scale(self.metric)) for name in names}

    @property
    def begin(self) -> int:
        """The epoch at which phase 2 begins."""
        return int(self.result["epochs"]["large_batch"])

    @property
    def end(self) -> int:
        """The epoch at which phase 2 ends."""
        return self.begin + int(self.result["epochs"]["refine"])


def _shown(value: float | None, factor: float) -> float | None:
    return factor * value if value is not None and isfinite(value) else None


def draw_curves(run: Path, file: Path) -> None:
    """Draw the main metric of phase 1, every group and the average, above the learning rate.

    Phase 2 has a second pair of axes with a scale of its own. The run need not be complete.

    Args:
        run: the run's folder.
        file: the figure to write.

    Raises:
        UserError: the folder holds no run.
    """
    shown = _read(run)
    result = shown.result
    title = f"{result['recipe']}, seed {result['seed']}"
    if result["ranks"]:
        title += f", {result['ranks']} rank{'s' * (result['ranks'] != 1)}"
    both = bool(shown.groups and shown.large_batch)
    with figure_in(file, title, 3.7) as figure:
        axes = figure.subplots(
            2, 2 if both else 1, sharex="col", squeeze=False, height_ratios=(2.3, 1)
        )
        for top, bottom in axes.T:
            _draw_metric(top, shown)
            _draw_learning_rate(bottom, shown)
            count_epochs(bottom)
        axes[0, 0].set_ylabel(axis_label(shown.split, shown.metric))
        axes[1, 0].set_ylabel("learning rate")
        if both:
            mark_phases(axes[0, 0], shown.begin, ("phase 1: large batch", "phase 2"))
            mark_phases(axes[1, 0], shown.begin)
            axes[0, 1].set_title("phase 2: refinement", loc="left", pad=5)
            _limit_to_refinement(axes[0, 1], axes[1, 1], shown)
        _draw_ends(axes[0, -1], shown)
        place_labels(axes[0, 0], _ema_labels(shown, shown.large_batch, 0, LARGE_BATCH))


def _read(run: Path) -> _Run:
    metrics = run / "metrics"
    result = load_run(run)
    world = read_lines(metrics / "world.jsonl")
    groups = [read_lines(path) for path in sorted(metrics.glob("group-*.jsonl"))]
    return _Run(
        recipe=load_recipe(str(run / "recipe.toml")),
        result=result,
        large_batch=[line for line in world if line["phase"] == "large_batch"],
        groups=[lines for lines in groups if lines],
        averages=[line for line in world if line.get("model") == "average"],
    )


def _draw_metric(axis: "Axes", run: _Run) -> None:
    averaged = run.ends["averaged"]
    axis.plot(*_values(run, run.large_batch, 0), ".-", color=LARGE_BATCH)
    axis.plot(*_values(run, run.large_batch, 0, of="ema_"), "--", color=LARGE_BATCH, lw=1)
    fork = _fork(run)
    for lines in run.groups:
        axis.plot(*_values(run, lines, run.begin, fork), ".-", color=GROUPS, lw=1, ms=3)
        axis.plot(*_values(run, lines, run.begin, of="ema_"), "--", color=GROUPS, lw=1)
    if run.averages:
        epochs, values = _values(run, run.averages, run.begin, fork)
        if averaged is not None:
            epochs, values = [*epochs, run.end], [*values, averaged]
        axis.plot(epochs, values, color=SWAP)
    if averaged is not None:
        axis.plot(run.end, averaged, "*", color=SWAP, ms=10, mew=0, clip_on=False, zorder=4)


def _fork(run: _Run) -> list[tuple[float, float]]:
    """Return the point at which the groups part: the end of phase 1, where it was evaluated."""
    value = run.ends["large_batch"]
    return [] if value is None else [(run.begin, value)]


def _values(
    run: _Run,
    lines: Lines,
    begin: int,
    before: Sequence[tuple[float, float]] = (),
    of: Literal["", "ema_"] = "",
) -> Curve:
    """Return epochs of the run and the main metric, where it was measured, in percent if a share.

    Where the metric was not finite it is NaN, which leaves a gap in a line.

    Args:
        run: the run.
        lines: a part of the run.
        begin: the epoch of the run at which this part begins.
        before: points to begin with.
        of: "ema_" for the moving average of the weights, where the recipe asks for it.
    """
    key, factor = f"{of}{run.split}_{run.metric}", scale(run.metric)
    measured = [line for line in lines if line.get(key) is not None]
    points = [*before, *((begin + line["epoch"], factor * line[key]) for line in measured)]
    return [x for x, _ in points], [y if isfinite(y) else nan for _, y in points]


def _draw_learning_rate(axis: "Axes", run: _Run) -> None:
    if run.large_batch:
        phase = run.recipe.large_batch
        steps = _steps(run.large_batch, phase.batch_size)
        axis.plot(*learning_rates(phase, len(run.large_batch), steps, 0), color=LARGE_BATCH)
    if run.groups:
        axis.plot(*_refinement_rates(run), color=GROUPS)
    axis.set_ylim(0, None)


def _refinement_rates(run: _Run) -> Curve:
    """Return the learning rate of every step of the refinement, so far."""
    # all groups have one schedule: the one that is furthest shows the most of it
    furthest, refine = max(run.groups, key=len), run.recipe.refine
    return learning_rates(refine, len(furthest), _steps(furthest, refine.batch_size), run.begin)


def _steps(lines: Lines, batch_size: int) -> int:
    """Return the steps of an epoch."""
    return max(int(line["images"]) for line in lines) // batch_size


def learning_rates(phase: LargeBatch | Refine, epochs: int, steps: int, begin: int) -> Curve:
    """Return the learning rate of every step, and the epoch of the run at which the step begins.

    Args:
        phase: has the schedule, which restarts with each cycle.
        epochs: the number that was run, over all cycles.
        steps: steps of an epoch.
        begin: the epoch of the run at which the phase begins.
    """
    times = [(epoch, step / steps) for epoch in range(epochs) for step in range(steps)]
    rates = [phase.rate(epoch % phase.epochs + part) for epoch, part in times]
    return [begin + epoch + part for epoch, part in times], rates


def _limit_to_refinement(top: "Axes", bottom: "Axes", run: _Run) -> None:
    values = [y for lines in (*run.groups, run.averages) for y in _values(run, lines, 0)[1]]
    values += [y for lines in run.groups for y in _values(run, lines, 0, of="ema_")[1]]
    ends = (run.ends["large_batch"], run.ends["averaged"])
    values += [end for end in ends if end is not None]
    top.set_xlim(run.begin, run.end)
    if finite := [value for value in values if isfinite(value)]:
        margin = 0.08 * (max(finite) - min(finite)) + 0.001 * scale(run.metric)
        top.set_ylim(min(finite) - margin, max(finite) + margin)
    _, rates = _refinement_rates(run)
    bottom.set_ylim(0, 1.1 * max(rates) or 1)


def _draw_ends(axis: "Axes", run: _Run) -> None:
    """Draw the ends of phase 1 and of phase 2 as points, with their values."""
    ends = []
    averaged, mean = run.ends["averaged"], run.ends["mean_of_groups"]
    digits = ".2f" if scale(run.metric) == 100 else ".5g"
    if averaged is not None and mean is not None:
        axis.plot(run.end, mean, "o", mfc="white", mec=SWAP, mew=1.2, clip_on=False, zorder=3)
        ends.append(Label(run.end, averaged, f"average\n{averaged:{digits}}", SWAP))
        ends.append(Label(run.end, mean, f"before averaging\n{mean:{digits}}"))
    fork = _fork(run) if run.groups else []
    for epoch, value in fork:
        axis.plot(epoch, value, "o", color=LARGE_BATCH, clip_on=False, zorder=3)
    label_right(axis, ends)
    labels = [Label(x, y, f"end of phase 1: {y:{digits}}", LARGE_BATCH) for x, y in fork]
    for group in run.groups[:1]:
        labels += _ema_labels(run, group, run.begin, GROUPS)
    place_labels(axis, labels)


def _ema_labels(run: _Run, lines: Lines, begin: int, colour: str) -> list[Label]:
    """Return a label at the middle of a part's moving average of the weights, if it has one."""
    curve = zip(*_values(run, lines, begin, of="ema_"), strict=True)
    points = [(x, y) for x, y in curve if isfinite(y)]
    return [Label(*points[len(points) // 2], "EMA of the weights", colour)] if points else []
