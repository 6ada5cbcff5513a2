"""Labels at points of a figure, in place of a legend."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from swap_hpc.study.figures.style import GROUPS, INK, darker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

SIZE = 8.5  # of the text, in points
LINE = 1.25 * SIZE  # from a line of text to the next, in points

# Where a label may be: directions from its point, and distances in points. The first are best.
DIRECTIONS = ((1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1))
DISTANCES = (7.0, 20.0, 40.0)

# What makes a place worse, in units of one covered point (1/72 inch) of a line.
OUTSIDE, ON_A_LABEL, NEXT_DIRECTION, NEXT_DISTANCE = 10_000, 1_000, 0.5, 8
MARKER = 10  # a marker covers more than the line through it

ALIGNED = {-1: ("right", "top"), 0: ("center", "center"), 1: ("left", "bottom")}


@dataclass(frozen=True)
class Label:
    """A text that belongs to a point of the data."""

    x: float
    y: float
    text: str
    colour: str = INK


def label_right(axis: "Axes", labels: Sequence[Label]) -> None:
    """Write labels to the right of the axes, at the heights of their points or close to them."""
    if not labels:
        return
    _lay_out(axis)
    ordered = sorted(labels, key=lambda label: label.y)
    points = 72 / axis.figure.dpi
    places = [axis.transData.transform((label.x, label.y))[1] * points for label in ordered]
    heights = np.array(places)
    for upper, (below, above) in enumerate(pairwise(ordered), 1):
        apart = LINE * (below.text.count("\n") + above.text.count("\n") + 2) / 2 + 1
        heights[upper] = max(heights[upper], heights[upper - 1] + apart)
    # moved apart in both directions, not only upwards
    heights -= (heights - places).mean()
    for label, place, height in zip(ordered, places, heights, strict=True):
        _annotate(
            axis,
            label,
            xycoords=("axes fraction", "data"),
            xy=(1, label.y),
            xytext=(7, height - place),
            ha="left",
            va="center",
        )


def place_labels(axis: "Axes", labels: Sequence[Label]) -> None:
    """Write each label beside its point, where it covers the least of lines and other labels.

    Everything else has to be on the axes before. A thin line connects a label with its point
    where it is not close to it.
    """
    _lay_out(axis)
    lines = _pixels_of_lines(axis)
    taken: list[Bbox] = []
    for label in labels:
        candidates = [*_candidates(axis, label)]
        costs = [cost + _cost(_box(each), axis, lines, taken) for each, cost in candidates]
        best = candidates[int(np.argmin(costs))][0]
        for each, _ in candidates:
            if each is not best:
                each.remove()
        taken.append(_box(best))


def _lay_out(axis: "Axes") -> None:
    """Give the axes their final size, which decides where labels have room."""
    figure = axis.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()


def _candidates(axis: "Axes", label: Label) -> Iterator[tuple["Annotation", float]]:
    """Yield the label in every place where it may be, and how much worse than the first that is."""
    for far, distance in enumerate(DISTANCES):
        for turn, (right, up) in enumerate(DIRECTIONS):
            # a corner of a text is nearer to the point than the middle of its side
            length = distance / (2 if right and up else 1)
            line = {"arrowstyle": "-", "lw": 0.6, "color": GROUPS, "shrinkA": 0, "shrinkB": 4}
            annotation = _annotate(
                axis,
                label,
                xy=(label.x, label.y),
                xytext=(right * length, up * length),
                ha=ALIGNED[right][0],
                va=ALIGNED[up][1],
                arrowprops=line if far else None,
            )
            yield annotation, NEXT_DISTANCE * far + NEXT_DIRECTION * turn


def _annotate(axis: "Axes", label: Label, **arguments: Any) -> "Annotation":
    from matplotlib.patheffects import withStroke

    return axis.annotate(
        label.text,
        textcoords="offset points",
        color=darker(label.colour),
        fontsize=SIZE,
        linespacing=1.1,
        zorder=2.2,  # above lines of the default order, 2
        # readable on lines and on dark colours
        path_effects=[withStroke(linewidth=2.2, foreground="white", alpha=0.85)],
        **arguments,
    )


def _box(annotation: "Annotation") -> "Bbox":
    """Return the box of the text alone, in pixels."""
    from matplotlib.text import Text

    annotation.get_window_extent()  # moves the text to its place, and includes its line
    return Text.get_window_extent(annotation)


def _cost(box: "Bbox", axis: "Axes", lines: np.ndarray, taken: Sequence["Bbox"]) -> float:
    """Return how bad a place is.

    Args:
        box: the label's box, in pixels.
        axis: the axes that it should not leave.
        lines: (n, 2): pixels on lines, 1/72 inch apart.
        taken: boxes of the labels that have their place.
    """
    wide = box.padded(1.5 * axis.figure.dpi / 72)
    covered = (lines > wide.min).all(1) & (lines < wide.max).all(1)
    frame = axis.get_window_extent()
    inside = (
        frame.x0 <= wide.x0 and frame.y0 <= wide.y0 and wide.x1 <= frame.x1 and wide.y1 <= frame.y1
    )
    return OUTSIDE * (not inside) + ON_A_LABEL * wide.count_overlaps(taken) + covered.sum()


def _pixels_of_lines(axis: "Axes") -> np.ndarray:
    """Return (n, 2) pixels on all lines and markers of the axes, 1/72 inch apart."""
    found = [np.empty((0, 2))]
    for line in axis.lines:
        corners = line.get_transform().transform(np.asarray(line.get_xydata(), float))
        there = np.isfinite(corners).all(1)  # a line has gaps where a value is NaN
        for start, end in pairwise(corners):
            if not np.isfinite([start, end]).all():
                continue
            length = np.hypot(*(end - start)) * 72 / axis.figure.dpi
            found.append(np.linspace(start, end, int(length) + 2))
        if line.get_marker() not in ("None", None, ""):
            found += [corners[there]] * MARKER
    return np.concatenate(found)
