"""What a run says while it goes on: JSON lines, progress for a person, and where the time went."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swap_hpc.errors import RunError
from swap_hpc.parallel.atomic import write_whole
from swap_hpc.parallel.teams import Team
from swap_hpc.run.board import Board
from swap_hpc.train.events import Epoch, Evaluation, part_name

Line = dict[str, Any]


def epoch_fields(epoch: Epoch) -> Line:
    """An epoch as a line of JSON has it. Times are seconds, accuracies fractions."""
    test = epoch.test or Evaluation(None, None)  # type: ignore[arg-type]
    return {
        "phase": epoch.phase,
        "group": epoch.group,
        "cycle": epoch.cycle,
        "epoch": epoch.epoch,
        "learning_rate": epoch.learning_rate,
        "train_loss": epoch.train.loss,
        "train_accuracy": epoch.train.accuracy,
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "images": epoch.images,
        "images_per_second": epoch.images / epoch.train_seconds,
        "train_seconds": epoch.train_seconds,
        "evaluate_seconds": epoch.evaluate_seconds,
        "peak_memory_mib": epoch.peak_memory.host / 2**20,
        "peak_gpu_allocated_mib": epoch.peak_memory.gpu_allocated / 2**20 or None,
        "peak_gpu_reserved_mib": epoch.peak_memory.gpu_reserved / 2**20 or None,
    }


class Journal:
    """`metrics/*.jsonl` of a run's folder, each written by the first rank of the team whose numbers it holds, and the same in memory.

    A part's lines are saved with its checkpoints: where a run goes on from one, its file is made anew from them.
    """

    def __init__(self, folder: Path, teams: Mapping[str, Team], board: Board | None = None):
        """`teams`: "world", "group-000" ..., each that this job tells of, and whose numbers they are. `board`: is told the same."""
        self.folder, self.board = folder, board
        self.writes = {name: team.rank == 0 for name, team in teams.items()}
        self.lines: dict[str, list[Line]] = {name: [] for name in self.writes}

    def begin(self, name: str, lines: list[Line]) -> None:
        """The file holds just these lines, those of an earlier start."""
        self.lines[name] = list(lines)
        if self.writes[name]:
            write_whole(
                self._path(name),
                lambda temporary: temporary.write_text(
                    "".join(map(_json_line, lines)), encoding="utf-8"
                ),
            )
            if self.board:
                self.board.begin(name, lines, self._phase_1_epochs())

    def epoch(self, epoch: Epoch) -> None:
        self.add("world" if epoch.group is None else part_name(epoch.group), epoch_fields(epoch))

    def evaluation(self, model: str, result: Evaluation, **position: int) -> Line:
        """An evaluation by all ranks. `model`: "large_batch", "average" (on the way) or "swap"."""
        line = {
            "phase": "evaluation",
            "model": model,
            **position,
            "test_loss": result.loss,
            "test_accuracy": result.accuracy,
        }
        self.add("world", line)
        return line

    def add(self, name: str, line: Line) -> None:
        self.lines[name].append(line)
        if not self.writes[name]:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self._path(name), "a", encoding="utf-8") as file:
                file.write(_json_line(line))
            if self.board:
                self.board.add(name, line, self._phase_1_epochs())
        except OSError as error:
            raise RunError(f"cannot write {self._path(name)}: {error.strerror}") from None

    def end(self) -> None:
        """Makes sure that the files are on the disk, whatever happens to the machine."""
        for name, lines in self.lines.items():
            self.begin(name, lines)

    def last_test(self, name: str) -> Evaluation | None:
        """Of the model of a part's last line."""
        lines = self.lines[name]
        return Evaluation(lines[-1]["test_loss"], lines[-1]["test_accuracy"]) if lines else None

    def _phase_1_epochs(self) -> int:
        return sum(line["phase"] == "large_batch" for line in self.lines.get("world", ()))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"


def _json_line(line: Line) -> str:
    return json.dumps(line) + "\n"
