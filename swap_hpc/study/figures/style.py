"""The look of all figures: size, fonts, and one colour for each method."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from swap_hpc.parallel.atomic import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.2  # inches: the text of a page with narrow margins

# The palette of Okabe and Ito, readable with any colour vision: https://jfly.uni-koeln.de/color/
LARGE_BATCH = "#0072B2"  # phase 1, too
SMALL_BATCH = "#009E73"
SWAP = "#D55E00"  # the average
SWA = "#CC79A7"
POST_LOCAL_SGD = "#56B4E9"
BATCH_NORM = "#E69F00"
OTHERS = ("#000000", "#7A5195", "#8C6D31", "#E69F00")

GROUPS = "#8C8C8C"  # all groups alike: none of them is special
INK = "#333333"

# The first entry that occurs in a method's name gives its colour.
_COLOURS = (
    ("post-local", POST_LOCAL_SGD),
    ("SWAP", SWAP),
    ("SWA", SWA),
    ("small batch", SMALL_BATCH),
    ("large batch", LARGE_BATCH),
)

_SETTINGS = {
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    # the same when labels are placed and when the file is written
    "figure.dpi": 200,
    "savefig.dpi": "figure",
}


@contextmanager
def figure_in(file: Path, title: str, height: float) -> Iterator["Figure"]:
    """Yield an empty figure to draw on, then write it as a PNG file.

    Args:
        file: where it is written.
        title: what is shown, above all axes.
        height: in inches; the width is that of a page.
    """
    # matplotlib takes a second to import, which a training run need not wait for
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.suptitle(title)
        yield figure
        write_whole(file, lambda temporary: figure.savefig(temporary, format="png"))


def method_colours(methods: Iterable[str]) -> list[str]:
    """Return the colour of each method; one that is not known takes a further colour in turn."""
    colours: list[str] = []
    unknown = 0
    for method in methods:
        known = next((colour for name, colour in _COLOURS if name in method), None)
        if known is None:
            known = OTHERS[unknown % len(OTHERS)]
            unknown += 1
        colours.append(known)
    return colours


def darker(colour: str) -> tuple[float, float, float]:
    """Return a shade of a colour that is dark enough for text on white."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return 0.7 * red, 0.7 * green, 0.7 * blue


def count_epochs(axis: "Axes") -> None:
    """Let the x axis count epochs, with whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def mark_phases(axis: "Axes", begin: float, names: tuple[str, str] | None = None) -> None:
    """Draw the boundary between phase 1 and phase 2, and write their names above it.

    Args:
        axis: its x axis counts the epochs of a run.
        begin: the epoch at which phase 2 begins.
        names: what to call them; None leaves the names out.
    """
    axis.axvline(begin, color=INK, lw=0.8, ls=(0, (2, 2)), zorder=0.5)
    if names is None:
        return
    # aligned outwards, so that they do not touch, however short a phase is
    for place, (name, colour) in enumerate(zip(names, (LARGE_BATCH, INK), strict=True)):
        axis.annotate(
            name,
            (place, 1),
            xycoords="axes fraction",
            xytext=(0, 5),
            textcoords="offset points",
            ha="right" if place else "left",
            va="baseline",
            color=darker(colour),
        )
