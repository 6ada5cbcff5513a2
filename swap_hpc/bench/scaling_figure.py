"""The figure of `scaling.json`: seconds, bytes and memory against ranks and sizes."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swap_hpc.study.figures.labels import Label, place_labels
from swap_hpc.study.figures.style import (
    BATCH_NORM,
    GROUPS,
    INK,
    LARGE_BATCH,
    SWAP,
    figure_in,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Name, colour and marker of each phase.
PHASES = {
    "large_batch": ("phase 1: large batch", LARGE_BATCH, "o"),
    "refine": ("phase 2: refinement", GROUPS, "s"),
    "average": ("averaging", SWAP, "*"),
    "batchnorm": ("batch norm", BATCH_NORM, "D"),
}

NOTHING_SENT = "phase 2: 0 bytes"

# What each column varies, and its name on the axis.
COLUMNS = {"ranks": "ranks", "width": "parameters of the model", "samples": "training images"}

BYTES = {0: "0", 1e3: "1 kB", 1e4: "10 kB", 1e5: "100 kB", 1e6: "1 MB", 1e7: "10 MB", 1e8: "100 MB"}


def draw_scaling(cases: Sequence[dict[str, Any]], where: str, file: Path) -> None:
    """Draw a column for each of ranks, model and data, in which the other two stay the same.

    Args:
        cases: the measurements, as in `scaling.json`.
        where: the processors that the ranks had, in words.
        file: the figure to write.
    """
    with figure_in(file, f"one epoch of each phase; {where}", 6.4) as figure:
        axes = figure.subplots(3, 3, sharex="col", sharey="row")
        for column, across in zip(axes.T, COLUMNS, strict=True):
            _draw_column(column, _varied(cases, across), across)
        _scale_rows(axes[:, 0], cases)
        place_labels(axes[1, 1], [Label(cases[0]["parameters"], 0, NOTHING_SENT, GROUPS)])
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(PHASES))


def _varied(cases: Sequence[dict[str, Any]], across: str) -> list[dict[str, Any]]:
    """Return the cases that differ in one respect alone, in ascending order."""
    # the model and the data of the first case, on two ranks: the fewest that send anything
    usual = {"ranks": 2, "width": cases[0]["width"], "samples": cases[0]["samples"]}
    del usual[across]
    alike = [case for case in cases if all(case[name] == usual[name] for name in usual)]
    return sorted(alike, key=lambda case: case[across])


def _draw_column(column: Sequence["Axes"], cases: list[dict[str, Any]], across: str) -> None:
    seconds, sent, memory = column
    sizes = [case["parameters" if across == "width" else across] for case in cases]
    for phase, (name, colour, marker) in PHASES.items():
        style: dict[str, Any] = {"marker": marker, "color": colour, "label": name}
        figures = [case["phases"][phase] for case in cases]
        seconds.plot(sizes, [each["seconds"] for each in figures], **style)
        sent.plot(sizes, [each["bytes"] for each in figures], **style)
    memory.plot(sizes, [case["peak_memory_mib"] for case in cases], "o-", color=INK)
    memory.set_xlabel(COLUMNS[across])
    memory.set_xscale("log")
    memory.set_xticks(sizes, [_short(size) for size in sizes])
    memory.xaxis.minorticks_off()
    memory.margins(x=0.12)


def _short(size: int) -> str:
    if size >= 1e6:
        return f"{size / 1e6:.1f} M"
    return f"{size / 1e3:.0f} k" if size >= 1e5 else f"{size:,}"


def _scale_rows(column: Sequence["Axes"], cases: Sequence[dict[str, Any]]) -> None:
    """Scale the y axes, which all columns share."""
    from matplotlib.ticker import StrMethodFormatter

    seconds, sent, memory = column
    seconds.set_yscale("log")
    seconds.set_ylabel("seconds")
    seconds.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    seconds.yaxis.minorticks_off()
    largest = max(each["bytes"] for case in cases for each in case["phases"].values())
    # linear below a kilobyte, so that zero has a place: phase 2 sends nothing
    sent.set_yscale("symlog", linthresh=1e3, linscale=0.5)
    sent.set_ylim(-250, 3 * largest)
    ticks = [size for size in BYTES if size <= 3 * largest]
    sent.set_yticks(ticks, [BYTES[size] for size in ticks])
    sent.yaxis.minorticks_off()
    sent.set_ylabel("sent by a rank")
    memory.set_ylim(0, None)
    memory.set_ylabel("memory of a rank, MiB")
