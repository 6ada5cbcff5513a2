"""What a run says while it goes on: JSON lines, progress for a person, and where the time went."""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from swap_hpc.board import Board
from swap_hpc.errors import RunError
from swap_hpc.events import Epoch, Evaluation, SavePoint, part_name
from swap_hpc.files import write_whole
from swap_hpc.launcher import launched
from swap_hpc.ranks import Ranks, Team
from swap_hpc.recipe import Recipe

Line = dict[str, Any]
SECONDS = ("setup", "large_batch", "refine", "average", "batchnorm", "evaluate", "save", "total")


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
            write_whole(self._path(name), lambda temporary: temporary.write_text("".join(map(_json_line, lines)), encoding="utf-8"))
            if self.board:
                self.board.begin(name, lines, self._phase_1_epochs())

    def epoch(self, epoch: Epoch) -> None:
        self.add("world" if epoch.group is None else part_name(epoch.group), epoch_fields(epoch))

    def evaluation(self, model: str, result: Evaluation, **position: int) -> Line:
        """An evaluation by all ranks. `model`: "large_batch", "average" (on the way) or "swap"."""
        line = {"phase": "evaluation", "model": model, **position, "test_loss": result.loss, "test_accuracy": result.accuracy}
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


class Stopwatch:
    """Wall seconds by name: of this start of the run, and of the starts before it up to their last saves."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.before: dict[str, float] = {}
        self.own: defaultdict[str, float] = defaultdict(float)
        self.mark = perf_counter()

    def lap(self, name: str | None = None) -> None:
        """Adds the time since the last lap to `name`; to nothing without one."""
        now = perf_counter()
        if name:
            self.own[name] += now - self.mark
        self.mark = now

    def go_on_from(self, seconds: Mapping[str, float]) -> None:
        """`seconds`: what a save holds of the starts before. The latest save of several counts."""
        self.before = {name: max(value, self.before.get(name, 0.0)) for name, value in seconds.items()}

    def seconds(self) -> dict[str, float]:
        own = self._own()
        return {name: self.before.get(name, 0.0) + own[name] for name in SECONDS}

    def slowest(self, world: Team) -> dict[str, float]:
        """Of the ranks: in the starts before, and in this one, for which the slowest need not be the same."""
        own = world.maximum(*self._own().values())
        before = world.maximum(*(self.before.get(name, 0.0) for name in SECONDS))
        return {name: a + b for name, a, b in zip(SECONDS, before, own, strict=True)}

    def _own(self) -> dict[str, float]:
        own = {**self.own, "total": perf_counter() - self.started}
        return {name: own.get(name, 0.0) for name in SECONDS}


class Screen(Console):
    """A console that leaves it to its caller what to do where nobody reads it any more."""

    def on_broken_pipe(self) -> None:
        error = sys.exc_info()[1]
        assert error is not None
        raise error


class Display:
    """Shows epochs to a person: a live bar per phase on a terminal, else one line each. Silent on all ranks but the first."""

    def __init__(self, recipe: Recipe, ranks: Ranks, console: Console):
        self.recipe = recipe
        self.speaks = ranks.world.rank == 0
        self.console = console
        columns = (TextColumn("{task.description:<12}"), BarColumn(20), TextColumn("{task.completed}/{task.total}  {task.fields[says]}"))
        self.live = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not (self.speaks and console.is_terminal and _on_terminal())
        )
        self.tasks: dict[str, Any] = {}

    @contextmanager
    def running(self) -> Iterator["Display"]:
        with self.live:
            yield self

    def say(self, text: str) -> None:
        if self.speaks:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def goes_on(self, point: SavePoint) -> None:
        self.say(f"{_name(point.group)} goes on {'at its end' if point.ended else f'after epoch {point.epoch}, step {point.step}'}")

    def average(self, epoch: int, test: Evaluation) -> None:
        self.say(f"{'average':<12} epoch {epoch:>3}  test {test.accuracy:.4f}")

    def epoch(self, epoch: Epoch) -> None:
        phase = self.recipe.large_batch if epoch.group is None else self.recipe.refine
        total = phase.epochs * phase.cycles
        name = _name(epoch.group)
        test = f"  test {epoch.test.accuracy:.4f}" if epoch.test else ""
        says = f"train {epoch.train.accuracy:.4f}{test}  lr {epoch.learning_rate:.4g}  {epoch.images / epoch.train_seconds:,.0f} images/s"
        if self.live.disable:  # a log
            left = (total - epoch.epoch) * (epoch.train_seconds + epoch.evaluate_seconds)
            self.say(f"{name:<12} epoch {epoch.epoch:>3}/{total}  {says}  {_clock(left)} left in the phase")
        else:
            if name not in self.tasks:
                self.tasks[name] = self.live.add_task(name, total=total, says="")
            self.live.update(self.tasks[name], completed=epoch.epoch, says=says)
        if epoch.epoch < total and phase.stop_accuracy is not None and epoch.train.accuracy >= phase.stop_accuracy:
            self.say(f"{name} ends here: large_batch.stop_accuracy = {phase.stop_accuracy} is reached")


def _name(group: int | None) -> str:
    return "large_batch" if group is None else f"group {group}"


def _on_terminal() -> bool:
    """Whether a person looks at this process's output: under mpirun, which may give ranks a terminal of their own, at mpirun's."""
    if launched() is None:
        return sys.stdout.isatty()
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
