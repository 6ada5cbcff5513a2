"""The figure of `trajectory.json`: where the weights of a run went."""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from swap_hpc.study.figures.labels import Label, label_right
from swap_hpc.study.figures.style import (
    GROUPS,
    INK,
    LARGE_BATCH,
    count_epochs,
    figure_in,
    mark_phases,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_trajectory(content: dict[str, Any], file: Path) -> None:
    """Draw the cosine towards the average and the distances between groups, against epochs.

    Args:
        content: what `trajectory.json` holds.
        file: the figure to write.
    """
    begin = content["large_batch_epochs"]
    with figure_in(file, f"{content['recipe']}, seed {content['seed']}", 2.9) as figure:
        left, right = figure.subplots(1, 2)
        _draw_cosines(left, content["snapshots"], begin)
        left.set_ylabel("cosine of descent and\ndirection to the average")
        _draw_distances(right, content["between_groups"], begin)
        right.set_ylabel("distance of two groups (L2)")
        count_epochs(left)
        count_epochs(right)


def _draw_cosines(axis: "Axes", snapshots: list[dict[str, Any]], begin: int) -> None:
    parts = defaultdict(list)
    for each in snapshots:
        first = 0 if each["part"] == "large_batch" else begin
        parts[each["part"]].append((first + each["epoch"], each["cosine"]))
    phase_1 = sorted(parts.pop("large_batch", []))
    # the groups begin with the weights at the end of phase 1, and with their cosine
    fork = [point for point in phase_1 if point[0] == begin]
    axis.axhline(0, color=INK, lw=0.6)
    for points in parts.values():
        axis.plot(*zip(*fork, *sorted(points), strict=True), ".-", color=GROUPS, lw=1)
    if phase_1:
        axis.plot(*zip(*phase_1, strict=True), ".-", color=LARGE_BATCH)
        mark_phases(axis, begin, ("phase 1: large batch", "phase 2: groups"))


def _draw_distances(axis: "Axes", pairs: list[dict[str, Any]], begin: int) -> None:
    """Draw one line for each pair of groups, which part at the epoch `begin`, and their mean."""
    distances = defaultdict(list)
    at_epoch = defaultdict(list)
    for each in pairs:
        distances[tuple(each["groups"])].append((begin + each["epoch"], each["distance"]))
        at_epoch[begin + each["epoch"]].append(each["distance"])
    for points in distances.values():
        axis.plot(*zip((begin, 0.0), *points, strict=True), color=GROUPS, lw=1)
    means = [(begin, 0.0), *((epoch, mean(values)) for epoch, values in at_epoch.items())]
    axis.plot(*zip(*means, strict=True), color=INK, lw=1.8)
    axis.set_ylim(0, None)
    if pairs:
        epoch, value = means[-1]
        axis.set_xlim(begin, epoch)
        label_right(axis, [Label(epoch, value, f"mean of\n{len(distances)} pairs")])
