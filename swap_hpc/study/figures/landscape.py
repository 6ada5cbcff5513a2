"""The figure of `landscape.json`: error, or loss, on planes through the weights of a run."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from swap_hpc.study.figures.labels import Label, place_labels
from swap_hpc.study.figures.parts import part_label
from swap_hpc.study.figures.style import LARGE_BATCH, SWAP, WIDTH, figure_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.contour import QuadContourSet

FINEST = 0.1  # percentage points between contour lines
MOST_LEVELS = 10


def draw_landscape(content: dict[str, Any], file: Path) -> None:
    """Draw training error, or loss, on the left and that of the test on the right, for each plane.

    Args:
        content: what `landscape.json` holds.
        file: the figure to write.
    """
    planes, kinds = content["planes"], kinds_of(content)
    measured, factor = measured_in(content), factor_of(content)
    title = f"{content['recipe']}, seed {content['seed']}: {measured} on planes through the weights"
    levels = error_levels(content)
    highest = max(_finite(plane[kind]).max(initial=0) for plane in planes for kind in kinds)
    beyond = "max" if factor * highest > levels[-1] else "neither"
    shapes = [np.ptp(plane["y"]) / np.ptp(plane["x"]) for plane in planes]
    width = (WIDTH - 1.5) / 2  # of one plane; the rest is for ticks and the colour bar
    height = 0.55 + sum(0.55 + width * shape for shape in shapes)
    with figure_in(file, title, height) as figure:
        axes = figure.subplots(len(planes), 2, squeeze=False, height_ratios=shapes)
        for row, plane in zip(axes, planes, strict=True):
            for axis, kind in zip(row, kinds, strict=True):
                surface = _draw_surface(axis, plane, factor, kind, levels, beyond)
            row[0].set_title(f"{plane['title']}\ntraining {measured}", loc="left")
            row[0].set_ylabel("distance (L2)")
            row[1].set_title(f"test {measured}", loc="left")
            row[1].tick_params(labelleft=False)
        for axis in axes[-1]:
            axis.set_xlabel("distance of the weights (L2)")
        label = "error (%)" if measured == "error" else "loss"
        figure.colorbar(surface, ax=axes, label=label, ticks=levels, shrink=0.6)
        # labels are placed when all else is there: the colour bar makes the planes smaller
        for row, plane in zip(axes, planes, strict=True):
            for axis, kind in zip(row, kinds, strict=True):
                _draw_models(axis, plane, factor, kind)


def measured_in(content: dict[str, Any]) -> str:
    """Return what was measured: "error", a share, or "loss"."""
    return str(content.get("measured", "error"))


def kinds_of(content: dict[str, Any]) -> tuple[str, str]:
    """Return the keys of both surfaces of a plane."""
    return f"train_{measured_in(content)}", f"test_{measured_in(content)}"


def factor_of(content: dict[str, Any]) -> float:
    """Return the factor by which values are shown: 100, for percent, or 1."""
    return 100.0 if measured_in(content) == "error" else 1.0


def error_levels(content: dict[str, Any]) -> np.ndarray:
    """Return the contour levels that all planes share, in percent or in the loss's unit.

    They are round numbers, about ten at most, and no closer to each other than the standard error
    of an error rate from so many samples. The highest twentieth of the errors may lie above all
    levels: else the walls of a basin would leave few levels for what is inside.
    """
    planes, kinds = content["planes"], kinds_of(content)
    by_kind = [np.concatenate([_finite(plane[kind]) for plane in planes]) for kind in kinds]
    if not all(map(len, by_kind)):
        return np.arange(2.0)
    errors, factor = np.concatenate(by_kind), factor_of(content)
    low, high = factor * errors.min(), factor * np.quantile(errors, 0.95)
    finest = 1e-6 * max(1.0, abs(high))
    if measured_in(content) == "error":
        samples = min(_samples(each, content["samples"]) for each in by_kind)
        middle = float(np.median(errors))
        finest = max(FINEST, 100 * math.sqrt(middle * (1 - middle) / samples))
    step = _rounded_up(max(finest, (high - low) / MOST_LEVELS))
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return step * np.arange(first, last + 1)


def _finite(values: Any) -> np.ndarray:
    """Return the finite ones of nested lists of numbers, (n,): a loss may be NaN far out."""
    found = np.ravel(np.asarray(values, float))
    return found[np.isfinite(found)]


def _rounded_up(value: float) -> float:
    """Return the next number that is 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value)


def _samples(errors: np.ndarray, at_most: int) -> int:
    """Return the number of samples behind error rates: a data set may hold fewer than `at_most`.

    Error rates from n samples are multiples of 1 / n, so that no two are closer than that.
    """
    gaps = np.diff(np.unique(errors.round(9)))
    return min(at_most, round(1 / gaps.min())) if len(gaps) else at_most


def _draw_surface(
    axis: "Axes", plane: dict[str, Any], factor: float, kind: str, levels: np.ndarray, beyond: str
) -> "QuadContourSet":
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    # light where the error is low, and nowhere so dark that a label is not readable
    colours = ListedColormap(colormaps["YlGnBu"](np.linspace(0, 0.75, 256)))
    errors = np.ma.masked_invalid(factor * np.array(plane[kind], float))
    surface = axis.contourf(plane["x"], plane["y"], errors, levels, cmap=colours, extend=beyond)
    # thin lines separate shades that are close to each other
    axis.contour(plane["x"], plane["y"], errors, levels, colors="white", linewidths=0.5)
    axis.set_aspect("equal")
    axis.spines[["top", "right"]].set_visible(True)
    return surface


def _draw_models(axis: "Axes", plane: dict[str, Any], factor: float, kind: str) -> None:
    """Draw the models of a plane, with the errors of those that lie in it."""
    labels = []
    for model in plane["models"]:
        name, x, y = model["name"], model["x"], model["y"]
        label = part_label(name)
        if name == "swap":
            axis.plot(x, y, "*", color=SWAP, ms=12, mec="white", mew=0.8)
        else:
            colour = LARGE_BATCH if name == "large_batch" else "white"
            axis.plot(x, y, "o", color=colour, ms=6, mec="black", mew=0.8)
        digits = ".1f" if factor == 100 else ".4g"
        error = f": {factor * model[kind]:{digits}}" if model["in_plane"] else " (projected)"
        labels.append(Label(x, y, label + error))
    place_labels(axis, labels)
