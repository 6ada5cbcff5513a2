"""A run's metrics as TensorBoard's event files, made from the same lines as the JSON files."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from swap_hpc.errors import UserError
from swap_hpc.parallel.atomic import ask_guards
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run.lines import Line

# The fields of a line that become curves, besides the losses and metrics of each split.
FIELDS = (
    "learning_rate",
    "images_per_second",
    "peak_memory_mib",
    "gradient_norm",
    "gradient_norm_max",
    "clipped_steps",
    "skipped_steps",
    "loss_scale",
)

SPLITS = ("train", "validation", "test", "ema_validation", "ema_test")

AVERAGE = "average"  # the name of the averaged model's curves


def check_tensorboard(recipe: Recipe) -> None:
    """Check that TensorBoard is installed where a recipe wants it.

    Raises:
        UserError: it cannot be imported.
    """
    if not recipe.tensorboard:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"tensorboard = true, but it cannot be loaded ({error}): "
            "pip install tensorboard, or --set tensorboard=false"
        ) from None


class Point(NamedTuple):
    """A line of metrics as a place on curves."""

    curve: str  # the part of the run, or the average
    epoch: int  # on the x axis, of the whole run
    values: dict[str, float]


def point_of(part: str, line: Line, first: int, recipe: Recipe) -> Point | None:
    """Return the point that a line becomes, None where an earlier line has the same figures.

    Args:
        part: its name in the names of files; the average's lines are in those of "world".
        line: of the part.
        first: epochs of phase 1, which may end before its last.
        recipe: the run's.
    """
    if line.get("model") == "large_batch" and first:
        return None  # the line of phase 1's last epoch has them
    curve = AVERAGE if line.get("model") in ("average", "swap") else part
    measured = ("loss", *recipe.metric_names)
    keys = (*(f"{split}_{name}" for split in SPLITS for name in measured), *FIELDS)
    values = {key: line[key] for key in keys if line.get(key) is not None}
    return Point(curve, _epoch(line, first, recipe), values)


def _epoch(line: Line, first: int, recipe: Recipe) -> int:
    """Return the place of a line on the x axis; one without an epoch is at its phase's end."""
    if line["phase"] == "large_batch" or line.get("model") == "large_batch":
        return line.get("epoch", first)
    refine = recipe.refine
    return first + line.get("epoch", refine.epochs * refine.cycles)


class Curves(Protocol):
    """What gets the lines of a run besides the JSON files: `Board`, `Tracker`."""

    def begin(self, part: str, lines: Sequence[Line], first: int) -> None:
        """Hold just these lines of a part; see `Board.begin`."""

    def add(self, part: str, line: Line, first: int) -> None:
        """Add a line of a part; see `Board.begin`."""

    def end(self) -> None:
        """End: the job has no further lines."""


@dataclass
class Board:
    """Event files in one folder per part ("world", "group-000", ...) and one for the average.

    The x axis counts the epochs of the run: a group's epochs follow those of phase 1.
    """

    folder: Path
    recipe: Recipe
    writers: dict[str, Any] = field(default_factory=dict)  # name of the curves -> SummaryWriter

    def begin(self, part: str, lines: Sequence[Line], first: int) -> None:
        """Write the event files of a part anew, from these lines.

        Args:
            part: its name in the names of files; the average's lines are in those of "world".
            lines: all lines of the part so far.
            first: epochs of phase 1, which may end before its last.
        """
        names = (part, AVERAGE) if part == "world" else (part,)
        for name in names:
            if name in self.writers:
                self.writers.pop(name).close()
            ask_guards(self.folder / name)
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for line in lines:
            self.add(part, line, first)

    def add(self, part: str, line: Line, first: int) -> None:
        """Add a line of a part; see `begin`."""
        point = point_of(part, line, first, self.recipe)
        if point is None:
            return
        # Only a run that wants the files pays for this slow import.
        from torch.utils.tensorboard import SummaryWriter

        if point.curve not in self.writers:
            self.writers[point.curve] = SummaryWriter(str(self.folder / point.curve))
        for key, value in point.values.items():
            self.writers[point.curve].add_scalar(key, value, point.epoch)
        self.writers[point.curve].flush()

    def end(self) -> None:
        """Do nothing: each line is flushed."""
