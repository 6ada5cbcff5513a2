"""Figures of a study over several networks: the metric against seconds, seconds against rates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import numpy as np

from swap_hpc.recipe.metrics import axis_label, scale
from swap_hpc.recipe.wording import bit_rate
from swap_hpc.study.figures.labels import Label, label_right, place_labels
from swap_hpc.study.figures.style import INK, figure_in, method_colours
from swap_hpc.study.networks import Crossing, Timing
from swap_hpc.study.numbers import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Over = Mapping[str, Mapping[str, Timing]]  # seconds by method and network


def draw_over_networks(
    title: str, lines: Sequence[Line], over: Over, metric: str, file: Path
) -> None:
    """Draw the metric of each row against its seconds, a panel for each network.

    A hollow marker shows seconds that were computed from some epochs.

    Args:
        title: the study's.
        lines: the rows; one without results is left out.
        over: the seconds of each row.
        metric: the main metric's name.
        file: the figure to write.
    """
    networks = list(dict.fromkeys(name for seconds in over.values() for name in seconds))
    colours = dict(zip(over, method_colours(over), strict=True))
    shown = [line for line in lines if line.values]
    with figure_in(file, title, 1.2 + 2.1 * max(1, len(networks))) as figure:
        panels = figure.subplots(max(1, len(networks)), sharex=True, sharey=True, squeeze=False)
        for axis, network in zip(panels[:, 0], networks, strict=False):
            axis.set_title(network, loc="left")
            axis.grid()
            axis.margins(0.2, 0.18)  # room for labels
            labels = [
                _point(axis, line, over[line.method][network], metric, colours[line.method])
                for line in shown
                if network in over[line.method]
            ]
            place_labels(axis, labels)
        panels[-1, 0].set_xlabel("seconds of training")
        panels[len(panels) // 2, 0].set_ylabel(axis_label("test", metric))


def _point(axis: "Axes", line: Line, timing: Timing, metric: str, colour: str) -> Label:
    """Draw a row's mean and its standard deviation; return its label."""
    values = [scale(metric) * value for value in line.values.values()]
    x, y = timing.seconds, mean(values)
    if len(values) > 1:
        high = stdev(values)
        axis.plot((x, x), (y - high, y + high), color=colour, lw=1.1, zorder=2.5)
    face = colour if timing.complete else "white"
    axis.plot(x, y, "o", ms=6, mfc=face, mec=colour, mew=1.4, zorder=3)
    return Label(x, y, line.method, colour)


def draw_rates(
    title: str,
    rates: Mapping[str, float],
    over: Over,
    crossed: Sequence[Crossing],
    file: Path,
) -> None:
    """Draw the seconds of each row against the network's rate, and mark where rows cross.

    Args:
        title: the study's.
        rates: of the networks, Mbit/s.
        over: the seconds of each row; one that is known over a single network is left out.
        crossed: the crossings to mark.
        file: the figure to write.
    """
    colours = dict(zip(over, method_colours(over), strict=True))
    known = {method: by_network for method, by_network in over.items() if len(by_network) > 1}
    with figure_in(file, f"{title}\nseconds of training against the network's rate", 4.4) as figure:
        axis = figure.subplots()
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.invert_xaxis()  # slower networks to the right, where rows differ most
        labels = []
        for method, by_network in known.items():
            points = sorted(
                ((rates[name], timing) for name, timing in by_network.items()),
                key=lambda point: point[0],
            )
            labels.append(_curve(axis, method, points, colours[method]))
        for crossing in crossed:
            if crossing.megabits is not None and crossing.first in known:
                _mark(axis, crossing, rates, known[crossing.first])
        _plain_ticks(axis, [*rates.values()])
        axis.set_xlabel("rate of a rank's link, Mbit/s")
        axis.set_ylabel("seconds of training")
        axis.grid()
        label_right(axis, labels)


def _plain_ticks(axis: "Axes", rates: Sequence[float]) -> None:
    """Write numbers in full: the rates below, and 1, 2 and 5 times powers of ten at the left."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    axis.xaxis.set_major_locator(FixedLocator(rates))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for each in (axis.xaxis, axis.yaxis):
        each.set_minor_locator(NullLocator())
        each.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _curve(axis: "Axes", method: str, points: Sequence[tuple[float, Timing]], colour: str) -> Label:
    """Draw a row's seconds, linear in the reciprocal of the rate; return its label."""
    measured = [rate for rate, _ in points]
    seconds = [timing.seconds for _, timing in points]
    fine = np.geomspace(measured[0], measured[-1], 100)
    # Dashed: a row on one host, to which the network means nothing.
    dashes = "--" if all(timing.complete for _, timing in points) else "-"
    axis.plot(fine, seconds_at(fine, measured, seconds), color=colour, lw=1.4, ls=dashes)
    for (rate, timing), value in zip(points, seconds, strict=True):
        face = colour if timing.complete else "white"
        axis.plot(rate, value, "o", ms=5, mfc=face, mec=colour, mew=1.4, zorder=3)
    return Label(measured[0], seconds[0], method, colour)


def seconds_at(
    rates: np.ndarray, measured: Sequence[float], seconds: Sequence[float]
) -> np.ndarray:
    """Return the seconds at any rates, linear in the reciprocal of the rate between measured ones.

    Args:
        rates: where they are asked for, Mbit/s.
        measured: ascending rates, Mbit/s.
        seconds: at the measured rates.
    """
    # `np.interp` needs ascending places: reciprocals of descending rates.
    times_of_a_bit = [1 / rate for rate in reversed(measured)]
    return np.interp(1 / rates, times_of_a_bit, [*reversed(seconds)])


def _mark(
    axis: "Axes", crossing: Crossing, rates: Mapping[str, float], first: Mapping[str, Timing]
) -> None:
    """Mark the rate at which two rows take equally long."""
    assert crossing.megabits is not None
    points = sorted((rates[name], timing.seconds) for name, timing in first.items())
    measured, seconds = zip(*points, strict=True)
    (height,) = seconds_at(np.array([crossing.megabits]), measured, seconds)
    axis.plot(crossing.megabits, height, "x", color=INK, ms=7, mew=1.6, zorder=4)
    axis.annotate(
        bit_rate(1e6 * crossing.megabits),
        (crossing.megabits, height),
        xytext=(0, -12),
        textcoords="offset points",
        ha="center",
        color=INK,
    )
