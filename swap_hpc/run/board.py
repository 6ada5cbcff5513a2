"""A run's metrics for TensorBoard, each of its parts a run there. The JSON lines are the truth, this is made of them."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swap_hpc.errors import UserError
from swap_hpc.recipe.schema import Recipe

Line = dict[str, Any]


FIELDS = (
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "learning_rate",
    "images_per_second",
    "peak_memory_mib",
)

AVERAGE = "average"  # what the averaged model's run is called there


def check_tensorboard(recipe: Recipe) -> None:
    """Raises UserError where a recipe asks for it and it is not installed."""
    try:
        if recipe.tensorboard:
            import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"tensorboard = true, but it cannot be loaded ({error}): pip install tensorboard, or --set tensorboard=false"
        ) from None


@dataclass
class Board:
    """Event files: a folder for each part ("world", "group-000", ...), one for the averaged model. Against epochs of the run."""

    folder: Path
    recipe: Recipe
    writers: dict[str, Any] = field(default_factory=dict)

    def begin(self, part: str, lines: Sequence[Line], first: int) -> None:
        """The part's files hold just these lines. `first`: epochs of phase 1, which may end before its last."""
        for name in (part, AVERAGE) if part == "world" else (part,):
            if name in self.writers:
                self.writers.pop(name).close()
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for line in lines:
            self.add(part, line, first)

    def add(self, part: str, line: Line, first: int) -> None:
        if line.get("model") == "large_batch" and first:
            return  # its last epoch's line says the same
        from torch.utils.tensorboard import SummaryWriter

        name = _name(part, line)
        if name not in self.writers:
            self.writers[name] = SummaryWriter(str(self.folder / name))
        for key in FIELDS:
            if line.get(key) is not None:
                self.writers[name].add_scalar(key, line[key], self._epoch(line, first))
        self.writers[name].flush()

    def _epoch(self, line: Line, first: int) -> int:
        refine = self.recipe.refine
        if line["phase"] == "large_batch" or line.get("model") == "large_batch":
            return line.get("epoch", first)
        return first + line.get("epoch", refine.epochs * refine.cycles)


def _name(part: str, line: Line) -> str:
    """What TensorBoard calls the run that a line belongs to."""
    return AVERAGE if line.get("model") in ("average", "swap") else part
