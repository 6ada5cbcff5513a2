"""The files of a run -> figures. Imports neither torch nor MPI."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from swap_hpc.parallel.atomic import write_whole
from swap_hpc.run.folder import Lines, _lines, load_run


@contextmanager
def drawn(
    file: Path, title: str, rows: int, columns: int, size: tuple[float, float], **arguments: Any
) -> Iterator[np.ndarray]:
    """Axes (rows, columns) to draw on, of a figure of so many inches that is then written into `file`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, squeeze=False, layout="constrained", figsize=size, **arguments
    )
    try:
        yield axes
        figure.suptitle(title)
        write_whole(file, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
    finally:
        plt.close(figure)


def curves(run: Path, figure: Path) -> None:
    """Draws test accuracy and learning rate against epochs: the large batch, every group, and the averaged model's point.

    Where there was a refinement, a second pair of axes shows it alone, on a scale of its own.
    """
    result = load_run(run)
    large_batch = [
        line for line in _lines(run / "metrics" / "world.jsonl") if line["phase"] == "large_batch"
    ]
    groups = [
        lines for path in sorted((run / "metrics").glob("group-*.jsonl")) if (lines := _lines(path))
    ]
    averages = [
        line for line in _lines(run / "metrics" / "world.jsonl") if line.get("model") == "average"
    ]
    views = 2 if groups else 1
    ratios, size = (
        {"height_ratios": (3, 1), "width_ratios": (1, 0.8)[:views]},
        (1.5 + 3.5 * views, 5),
    )
    title = f"{result['recipe']}, seed {result['seed']}, {result['ranks'] or 'some'} ranks"
    with drawn(figure, title, 2, views, size, sharex="col", gridspec_kw=ratios) as axes:
        for top, bottom in axes.T:
            _draw(top, bottom, result, large_batch, groups, averages)
            bottom.set_xlabel("epoch")
        axes[0, 0].set_ylabel("test accuracy (%)")
        axes[1, 0].set_ylabel("learning rate")
        if groups:
            _zoom(axes[0, 1], axes[1, 1], result, groups, averages)
        axes[0, -1].legend(loc="lower right", fontsize="small")


def _draw(
    top: Any,
    bottom: Any,
    result: dict[str, Any],
    large_batch: list[dict[str, Any]],
    groups: list[list[dict[str, Any]]],
    averages: list[dict[str, Any]],
) -> None:
    begin, accuracy = result["epochs"]["large_batch"], result["test_accuracy"]
    fork = [(begin, 100 * accuracy["large_batch"])] if accuracy["large_batch"] is not None else []
    top.plot(*_points(large_batch, 0), color="black", label="large batch")
    bottom.plot(*_points(large_batch, 0, "learning_rate", 1), color="black", lw=1)
    for lines in groups:
        top.plot(
            *_points(lines, begin, before=fork),
            alpha=0.8,
            lw=1.2,
            label=f"group {lines[0]['group']}" if len(groups) <= 8 else None,
        )
        bottom.plot(*_points(lines, begin, "learning_rate", 1), color="C0", lw=1)
    if accuracy["averaged"] is not None:
        end = begin + result["epochs"]["refine"]
        mean, averaged = 100 * accuracy["mean_of_groups"], 100 * accuracy["averaged"]
        top.plot(end, mean, "o", color="grey", label=f"mean of groups {mean:.2f}")
        if averages:  # evaluated on the way
            epochs, values = _points(averages, begin, before=fork)
            top.plot([*epochs, end], [*values, averaged], color="red", lw=1.5)
        top.plot(end, averaged, "*", color="red", ms=12, label=f"averaged {averaged:.2f}")


def _points(
    lines: Lines,
    start: int,
    field: str = "test_accuracy",
    scale: float = 100,
    before: Sequence[tuple[float, float]] = (),
) -> tuple[list[float], list[float]]:
    """Epochs of the run and values of a field, where it was measured."""
    points = [
        *before,
        *(
            (start + line["epoch"], scale * line[field])
            for line in lines
            if line[field] is not None
        ),
    ]
    return [x for x, _ in points], [y for _, y in points]


def _zoom(
    top: Any, bottom: Any, result: dict[str, Any], groups: list[Lines], averages: Lines
) -> None:
    """Limits the axes to the refinement."""
    begin, accuracy = result["epochs"]["large_batch"], result["test_accuracy"]
    curves = [y for lines in (*groups, averages) for y in _points(lines, begin)[1]]
    ends = (accuracy["large_batch"], accuracy["averaged"])
    values = [*(100 * end for end in ends if end is not None), *curves]
    margin = 0.05 * (max(values) - min(values)) + 0.1
    top.set(
        xlim=(begin - 0.1, begin + result["epochs"]["refine"] + 0.3),
        ylim=(min(values) - margin, max(values) + margin),
        title="refinement",
    )
    highest = max(line["learning_rate"] for lines in groups for line in lines)
    bottom.set_ylim(-0.05 * highest, 1.1 * highest or 1)


MARKS = {"large_batch": ("s", "end of phase 1"), "swap": ("*", "average")}  # the others are groups


def landscape(content: dict[str, Any], file: Path) -> None:
    """Draws the errors in `landscape.json`: a row for each plane, training error on the left, test error on the right."""
    planes = content["planes"]
    title = f"{content['recipe']}, seed {content['seed']}: error (%) on planes through the weights, batch norm refreshed at every point"
    with drawn(file, title, len(planes), 2, (11, 4.6 * len(planes))) as axes:
        for row, plane in zip(axes, planes, strict=True):
            for axis, kind in zip(row, ("train", "test"), strict=True):
                _surface(axis, plane, f"{kind}_error")
                axis.set(
                    title=f"{kind}: {plane['title']}",
                    xlabel="distance of the weights (L2)",
                    aspect="equal",
                )


def _surface(axis: Any, plane: dict[str, Any], errors: str) -> None:
    values = 100 * np.array(plane[errors])
    low, high = values.min(), values.max()
    steps = np.geomspace(0.02, 1, 14) if high > low else np.ones(1)
    levels = low + (high - low or 1) * np.concatenate(
        [[0], steps]
    )  # close to each other in the basin
    filled = axis.contourf(plane["x"], plane["y"], values, levels, cmap="viridis_r")
    axis.contour(plane["x"], plane["y"], values, levels, colors="white", linewidths=0.4)
    axis.figure.colorbar(filled, ax=axis, format="%.1f", label="error (%)")
    for model in plane["models"]:
        marker, label = MARKS.get(model["name"], ("o", _label(model["name"])))
        size, colour = (13, "red") if marker == "*" else (8, "white")
        axis.plot(model["x"], model["y"], marker, ms=size, mfc=colour, mec="black")
        error = (
            f"{label} {100 * model[errors]:.2f}" if model["in_plane"] else f"{label} (projected)"
        )
        right = (
            model["x"] > 0.3 * plane["x"][0] + 0.7 * plane["x"][-1]
        )  # the text would leave the picture
        place = {"xytext": (-7 if right else 7, 5), "ha": "right" if right else "left"}
        axis.annotate(
            error, (model["x"], model["y"]), textcoords="offset points", fontsize="small", **place
        )


def trajectory(content: dict[str, Any], file: Path) -> None:
    """Draws `trajectory.json`: the cosine towards the average, and the distances between the groups, against epochs of the run."""
    begin = content["large_batch_epochs"]
    title = f"{content['recipe']}, seed {content['seed']}"
    with drawn(file, title, 1, 2, (11, 4.2)) as axes:
        left, right = axes[0]
        for part in sorted(
            {each["part"] for each in content["snapshots"]},
            key=lambda part: (part.startswith("group"), part),
        ):
            first, colour = (0, "black") if part == "large_batch" else (begin, None)
            mine = [
                (first + each["epoch"], each["cosine"])
                for each in content["snapshots"]
                if each["part"] == part
            ]
            left.plot(*zip(*mine, strict=True), ".-", color=colour, lw=1, label=_label(part))
        left.axhline(0, color="grey", lw=0.8)
        left.set(
            xlabel="epoch",
            ylabel="cosine",
            title="negative gradient and the direction to the average",
        )
        left.legend(fontsize="small")
        pairs = content["between_groups"]
        for pair in sorted({tuple(each["groups"]) for each in pairs}):
            mine = [
                (begin, 0.0),
                *(
                    (begin + each["epoch"], each["distance"])
                    for each in pairs
                    if tuple(each["groups"]) == pair
                ),
            ]
            right.plot(*zip(*mine, strict=True), color="C0", alpha=0.5, lw=1)
        right.set(
            xlabel="epoch", ylabel="distance of the weights (L2)", title="groups, pair by pair"
        )


def _label(part: str) -> str:
    return (
        f"group {int(part.removeprefix('group-'))}"
        if part.startswith("group-")
        else part.replace("_", " ")
    )


def redraw(run: Path) -> list[Path]:
    """Draws again what a run's JSON files hold the numbers of. Returns the figures."""
    figures = []
    for name, draw in (("landscape", landscape), ("trajectory", trajectory)):
        if (run / f"{name}.json").is_file():
            draw(
                json.loads((run / f"{name}.json").read_text(encoding="utf-8")), run / f"{name}.png"
            )
            figures.append(run / f"{name}.png")
    return figures
