"""Draw the grid of ranks and the communicator of each phase, for the README.

python tests/pages/grid.py [FILE]
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import FancyBboxPatch

FILE = Path(__file__).with_suffix(".svg")

GROUPS, PEERS = 3, 2
COLOURS = ("#c44e52", "#4c72b0", "#55a868")  # one for each group's copy of the model
ONE_MODEL = "#8c8c8c"
OUTLINE = "#222222"
RANK = 0.62  # side of a rank's square; ranks are 1 apart

PHASES = (
    ("1  large batch", "world", "Horovod averages the gradients\nof one model over all ranks"),
    ("2  refine", "group: a row", "each group trains a copy alone;\nnothing passes between groups"),
    ("3  average", "peers: a column", "MPI averages the weights;\nbatch norm is re-estimated"),
)


def draw(file: Path) -> None:
    """Draw the three phases side by side into an SVG or PNG file."""
    # Text as outlines: it looks the same wherever the page is shown. The salt makes ids repeat.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "grid"}):
        layout = ConstrainedLayoutEngine(h_pad=0.1)  # inches
        figure = Figure(figsize=(9, 3.9), facecolor="white", layout=layout)
        all_axes = figure.subplots(1, len(PHASES))
        for axes, (name, communicator, what) in zip(all_axes, PHASES, strict=True):
            _frame(axes)
            axes.set_title(f"phase {name}", fontsize=13, fontweight="bold")
            axes.text(0.5, 2.95, communicator, ha="center", fontsize=11, style="italic")
            axes.text(0.5, 3.25, what, ha="center", va="top", fontsize=10)
        _label_groups(all_axes[0])
        _draw_ranks(all_axes[0], [ONE_MODEL] * GROUPS)
        _outline(all_axes[0], 0, 0, PEERS, GROUPS)
        _draw_ranks(all_axes[1], COLOURS)
        for group in range(GROUPS):
            _outline(all_axes[1], 0, group, PEERS, 1)
        _draw_ranks(all_axes[2], COLOURS)
        for peer in range(PEERS):
            _outline(all_axes[2], peer, 0, 1, GROUPS)
        figure.savefig(file, dpi=120, metadata={"Date": None} if file.suffix == ".svg" else None)


def _frame(axes: Axes) -> None:
    axes.set(xlim=(-1.1, 2.1), ylim=(3.85, -0.65), aspect="equal")
    axes.axis("off")


def _label_groups(axes: Axes) -> None:
    for group in range(GROUPS):
        axes.text(-0.62, group, f"group {group}", ha="right", va="center", fontsize=10)


def _draw_ranks(axes: Axes, colours: Sequence[str]) -> None:
    for rank in range(GROUPS * PEERS):
        group, peer = divmod(rank, PEERS)
        corner = (peer - RANK / 2, group - RANK / 2)
        style = "round,pad=0,rounding_size=0.1"
        square = FancyBboxPatch(corner, RANK, RANK, style, fc=colours[group], ec="none")
        axes.add_patch(square)
        axes.text(peer, group, str(rank), ha="center", va="center", color="white", fontsize=14)


def _outline(axes: Axes, peer: int, group: int, peers: int, groups: int) -> None:
    """Enclose the ranks of one communicator."""
    margin = 0.42
    corner = (peer - margin, group - margin)
    width, height = peers - 1 + 2 * margin, groups - 1 + 2 * margin
    style = "round,pad=0,rounding_size=0.18"
    axes.add_patch(FancyBboxPatch(corner, width, height, style, fc="none", ec=OUTLINE, lw=1.8))


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
