"""The figure of a study: the main metric of every method against its seconds."""

from collections.abc import Container, Sequence
from math import isfinite
from pathlib import Path
from statistics import mean, stdev
from textwrap import fill
from typing import TYPE_CHECKING

from swap_hpc.recipe.metrics import axis_label, scale
from swap_hpc.study.figures.labels import Label, place_labels
from swap_hpc.study.figures.style import figure_in, method_colours
from swap_hpc.study.numbers import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST = 22  # characters in a line of a label


def draw_methods(
    title: str, lines: Sequence[Line], before: Container[str], metric: str, file: Path
) -> None:
    """Draw each row's mean, and its standard deviation in both directions, labelled at the point.

    Args:
        title: the study's.
        lines: the rows; one without results or seconds, or whose mean is not finite, is left out.
        before: the methods that are a mean over models before averaging; their markers are hollow.
        metric: the main metric's name.
        file: the figure to write.
    """
    factor = scale(metric)
    seeds = max((len(line.values) for line in lines), default=0)
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    with figure_in(file, f"{title}\n{spread}", 4.0) as figure:
        axis = figure.subplots()
        colours = method_colours(line.method for line in lines)
        pairs = zip(lines, colours, strict=True)
        shown = [pair for pair in pairs if _can_be_drawn(pair[0])]
        for line, colour in shown:
            face = "white" if line.method in before else colour
            _draw(axis, line, factor, colour, face)
        computed = any(line.workers > line.ranks for line in lines)
        per_worker = ", with a rank per worker" if computed else ""
        axis.set_xlabel(f"seconds of training{per_worker}")
        axis.set_ylabel(axis_label("test", metric))
        axis.grid()
        axis.margins(0.24, 0.1)  # room for labels
        place_labels(axis, [_label(line, factor, colour) for line, colour in shown])


def _can_be_drawn(line: Line) -> bool:
    return bool(line.parallel_seconds) and isfinite(mean(line.values.values()))


def _draw(axis: "Axes", line: Line, factor: float, colour: str, face: str) -> None:
    x, y = _means(line, factor)
    # Plain lines instead of `errorbar`, because labels keep clear of lines. They are above the
    # labels, which must not hide the end of one.
    if len(line.parallel_seconds) > 1:
        wide = stdev(line.parallel_seconds.values())
        axis.plot((x - wide, x + wide), (y, y), color=colour, lw=1.1, zorder=2.5)
    if len(line.values) > 1:
        high = stdev(factor * value for value in line.values.values())
        axis.plot((x, x), (y - high, y + high), color=colour, lw=1.1, zorder=2.5)
    axis.plot(x, y, "o", ms=7, mfc=face, mec=colour, mew=1.4, zorder=3)


def _label(line: Line, factor: float, colour: str) -> Label:
    name = line.method
    if len(name) > LONGEST:
        # in two lines, at a comma where there is one
        name = name.replace(", ", ",\n", 1) if ", " in name else fill(name, LONGEST)
    return Label(*_means(line, factor), name, colour)


def _means(line: Line, factor: float) -> tuple[float, float]:
    """Return the mean seconds, and the mean metric as it is shown."""
    return mean(line.parallel_seconds.values()), factor * mean(line.values.values())
