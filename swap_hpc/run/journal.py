"""The metrics of a run: `metrics/world.jsonl`, `metrics/group-000.jsonl` and so on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from swap_hpc.data.dataset import SplitName
from swap_hpc.data.sampling import EVALUATION
from swap_hpc.errors import RunError
from swap_hpc.parallel.atomic import append_text, write_text
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Part
from swap_hpc.run.board import Curves
from swap_hpc.run.lines import Line, evaluation_in, figures
from swap_hpc.train.events import Epoch, Evaluation
from swap_hpc.train.updates import Updates


def epoch_fields(epoch: Epoch, has_validation: bool = False) -> Line:
    """Return an epoch as a line of metrics. Times are in seconds, accuracies are fractions.

    Args:
        epoch: the epoch.
        has_validation: there is a validation split.
    """
    metrics = [*epoch.train.metrics]
    return {
        "phase": epoch.part.phase.value,
        "group": epoch.part.group,
        "cycle": epoch.cycle,
        "epoch": epoch.epoch,
        "learning_rate": epoch.learning_rate,
        **figures("train", replace(epoch.train, by_class={}), metrics),
        **(figures("validation", epoch.validation, metrics) if has_validation else {}),
        **figures("test", epoch.test, metrics),
        **_ema_fields(epoch),
        "images": epoch.images,
        "images_per_second": epoch.images / epoch.train_seconds,
        "train_seconds": epoch.train_seconds,
        "evaluate_seconds": epoch.evaluate_seconds,
        "peak_memory_mib": epoch.peak_memory.host / 2**20,
        "peak_gpu_allocated_mib": epoch.peak_memory.gpu_allocated / 2**20 or None,
        "peak_gpu_reserved_mib": epoch.peak_memory.gpu_reserved / 2**20 or None,
        **_update_fields(epoch.updates),
    }


def _ema_fields(epoch: Epoch) -> Line:
    """Return the evaluations of the moving average of the weights, as `ema_test_accuracy`."""
    fields: Line = {}
    for split, result in epoch.ema.items():
        fields |= figures(f"ema_{split}", replace(result, by_class={}), result.metrics)
    return fields


def _update_fields(updates: Updates) -> Line:
    """Return the fields about clipping and loss scaling, where the recipe asks for them."""
    fields: Line = {}
    if updates.norms is not None:
        fields["gradient_norm"] = updates.mean_norm  # before clipping
        fields["gradient_norm_max"] = updates.largest_norm
        fields["clipped_steps"] = updates.clipped
    if updates.loss_scale is not None:
        fields["skipped_steps"] = updates.skipped
        fields["loss_scale"] = updates.loss_scale
    return fields


class Journal:
    """The lines of metrics of this job, in memory and in files.

    The first rank of a part's team writes its file. Phase 1 and the evaluations by all ranks are in
    `world.jsonl`. A part's lines are saved with its checkpoints: where a run resumes from one, the
    file is made anew from them.
    """

    def __init__(
        self,
        folder: Path,
        teams: Mapping[Part, Team],
        curves: Sequence[Curves] = (),
        has_validation: bool = False,
    ):
        """
        Args:
            folder: of the files.
            teams: the parts of the run that this job has lines of, and whose numbers they are.
            curves: get the same lines.
            has_validation: there is a validation split.
        """
        self.folder, self.curves, self.has_validation = folder, curves, has_validation
        self.writes = {part: team.rank == 0 for part, team in teams.items()}
        self.lines: dict[Part, list[Line]] = {part: [] for part in self.writes}
        self.earlier_epochs = 0  # of phase 1, where another job has its lines

    def begin(self, part: Part, lines: list[Line]) -> None:
        """Let the file of a part hold just the lines of an earlier start."""
        self.lines[part] = list(lines)
        if not self.writes[part]:
            return
        write_text(self._path(part), "".join(map(_json_line, lines)))
        for each in self.curves:
            each.begin(metrics_name(part), lines, self._phase_1_epochs())

    def epoch(self, epoch: Epoch) -> None:
        self.add(epoch.part, epoch_fields(epoch, self.has_validation))

    def evaluation(
        self, model: str, results: Mapping[SplitName, Evaluation], **position: int
    ) -> Line:
        """Add an evaluation by all ranks.

        Args:
            model: "large_batch", "average" (before the end) or "swap".
            results: its loss and metrics, by split.
            position: the epoch of the refinement, before its end.

        Returns:
            The line.
        """
        line: Line = {
            "phase": EVALUATION,
            "model": model,
            **position,
        }
        for split, result in results.items():
            line |= figures(split, result, result.metrics)
        self.add(PHASE_1, line)
        return line

    def add(self, part: Part, line: Line) -> None:
        """Append a line to the file of a part.

        Raises:
            RunError: it cannot be written.
        """
        self.lines[part].append(line)
        if not self.writes[part]:
            return
        append_text(self._path(part), _json_line(line))
        try:
            for each in self.curves:
                each.add(metrics_name(part), line, self._phase_1_epochs())
        except OSError as error:
            raise RunError(f"cannot write {self._path(part)}: {error.strerror}") from None

    def end(self) -> None:
        """Flush the files to the disk: write them again, whole."""
        for part, lines in self.lines.items():
            self.begin(part, lines)
        for each in self.curves:
            each.end()

    def last(self, part: Part, metrics: Sequence[str]) -> dict[SplitName, Evaluation]:
        """Return the evaluations in a part's last line, by split.

        None where it has no line, or one without the validation split, as a phase 1 that was
        adopted from a run of an earlier version may have.
        """
        splits: tuple[SplitName, ...] = ("validation", "test") if self.has_validation else ("test",)
        line = self.lines[part][-1] if self.lines[part] else {}
        if not all(f"{split}_loss" in line for split in splits):
            return {}
        return {split: evaluation_in(line, split, metrics) for split in splits}

    def _phase_1_epochs(self) -> int:
        if PHASE_1 not in self.lines:
            return self.earlier_epochs
        return sum(line["phase"] == PHASE_1.phase for line in self.lines[PHASE_1])

    def _path(self, part: Part) -> Path:
        return self.folder / f"{metrics_name(part)}.jsonl"


def metrics_name(part: Part) -> str:
    """Return the name of a part's file of metrics, without its suffix."""
    return "world" if part == PHASE_1 else part.name


def _json_line(line: Line) -> str:
    return json.dumps(line) + "\n"
