"""The best checkpoint: each part's weights at the epoch with the best metric on validation.

Which epoch is best follows from the part's lines of metrics, which are saved with its checkpoints.
Between saves there may be a later candidate, whose epochs a run that goes on from the last save
trains again: so candidates are kept until no save that may be used can ask for them any more.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfile
from typing import NamedTuple

from swap_hpc.errors import UserError
from swap_hpc.parallel.atomic import remove, write_whole
from swap_hpc.parallel.grid import Ranks, of_groups
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.metrics import MetricChoice
from swap_hpc.recipe.phase import Part
from swap_hpc.run.lines import Line
from swap_hpc.run.weights import write_tensors
from swap_hpc.train.events import SavePoint
from swap_hpc.train.job import Job


class BestEpoch(NamedTuple):
    """The epoch of a part with the best main metric on validation samples."""

    epoch: int  # from 1, since the phase began
    value: float


def check_best(job: Job) -> None:
    """Raise UserError where a recipe wants the best checkpoint and nothing may choose it."""
    if job.recipe.checkpoint.best and job.dataset.validation is None:
        raise UserError(
            "checkpoint.best = true chooses by validation samples, and the data have none: "
            "set data.validation, or put a folder val beside test"
        )


def best_epoch(lines: Sequence[Line], metric: MetricChoice) -> BestEpoch | None:
    """Return the best epoch in a part's lines, the first of equal ones; None: none is evaluated."""
    best: BestEpoch | None = None
    for line in lines:
        value = line.get(f"validation_{metric.key}")
        if "epoch" not in line or "cycle" not in line or value is None:
            continue
        if best is None or metric.better(value, than=best.value):
            best = BestEpoch(line["epoch"], value)
    return best


def best_file(out: Path, part: Part) -> Path:
    """Return the file that a part's best weights are left in."""
    return out / f"{part.name}-best.safetensors"


def best_of_parts(
    out: Path, lines: Mapping[Part, Sequence[Line]], metric: MetricChoice, ranks: Ranks
) -> dict[str, dict[str, float]]:
    """Return the best epochs of the parts whose best weights lie in a run's folder; collective.

    Args:
        out: the run's folder.
        lines: the metrics of phase 1 and of this rank's groups.
        metric: the main metric.
        ranks: whose lines count.

    Returns:
        The best epochs on the first rank; on the others nothing.
    """
    mine = {part: best_epoch(each, metric) for part, each in lines.items()}
    everyones = of_groups(mine, ranks) or []
    found = {part: best for each in everyones for part, best in each.items() if best}
    return {
        part.name: {"epoch": found[part].epoch, f"validation_{metric.key}": found[part].value}
        for part in sorted(found, key=lambda part: part.group or -1)
        if best_file(out, part).is_file()
    }


@dataclass
class BestKeeper:
    """Keeps each part's best weights, as candidates in the folder of checkpoints until its end."""

    out: Path
    folder: Path
    metric: MetricChoice
    header: dict[str, str]
    # part -> the best epoch at its last save: the one before may still be resumed from
    _at_last_save: dict[Part, int] = field(default_factory=dict)

    def resume(self, part: Part, lines: Sequence[Line], team: Team) -> None:
        """Forget the candidates after the save that a part resumes from."""
        best, last = best_epoch(lines, self.metric), max((n["epoch"] for n in lines), default=0)
        self._at_last_save[part] = best.epoch if best else 0
        team.first(lambda: self._remove(part, lambda epoch: epoch > last))

    def at_epoch_end(self, point: SavePoint, lines: Sequence[Line], team: Team) -> None:
        """Keep the weights of a save point at an epoch's end if no epoch before is as good."""
        best = best_epoch(lines, self.metric)
        if best and best.epoch == point.at.epoch and point.at.step == 0:
            file, tensors = self._candidate(point.part, best.epoch), point.weights | point.buffers
            team.first(lambda: write_tensors(file, tensors, self.header))

    def before_save(self, point: SavePoint, lines: Sequence[Line], team: Team) -> None:
        """Leave the best weights in the run's folder if the part has ended; forget old ones."""
        best, part = best_epoch(lines, self.metric), point.part
        if best is None:
            return
        oldest = self._at_last_save.get(part, 0)
        self._at_last_save[part] = best.epoch
        if point.ended:
            source, target = self._candidate(part, best.epoch), best_file(self.out, part)
            team.first(lambda: write_whole(target, lambda to: copyfile(source, to)))
        team.first(lambda: self._remove(part, lambda epoch: epoch < oldest))

    def _candidate(self, part: Part, epoch: int) -> Path:
        return self.folder / f"{part.name}-best-{epoch:05d}.safetensors"

    def _remove(self, part: Part, is_old: Callable[[int], bool]) -> None:
        for file in self.folder.glob(f"{part.name}-best-*.safetensors"):
            found = re.fullmatch(r".*-best-(\d+)", file.stem)
            if found and is_old(int(found[1])):
                remove(file)
