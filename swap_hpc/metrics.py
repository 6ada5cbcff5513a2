"""What a run says while it goes on: JSON lines, progress for a person, and where the time went."""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from swap_hpc.errors import RunError
from swap_hpc.fit import Epoch, Evaluation
from swap_hpc.launcher import launched
from swap_hpc.ranks import Ranks
from swap_hpc.recipe import Recipe


def epoch_fields(epoch: Epoch) -> dict[str, Any]:
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
    }


class Journal:
    """`metrics/*.jsonl` of a run's folder; each file is written by the first rank of the team whose numbers it holds."""

    def __init__(self, folder: Path, ranks: Ranks):
        self.folder = folder
        self.world = ranks.world.rank == 0
        self.group = ranks.group.rank == 0
        if self.world:
            for stale in folder.glob("*.jsonl"):
                stale.unlink()
        ranks.world.barrier()

    def epoch(self, epoch: Epoch) -> None:
        if epoch.group is None:
            self._write("world", self.world, epoch_fields(epoch))
        else:
            self._write(f"group-{epoch.group:03d}", self.group, epoch_fields(epoch))

    def evaluation(self, model: str, result: Evaluation) -> None:
        """A final evaluation, by all ranks, of the model whose file has that name."""
        self._write(
            "world", self.world, {"phase": "evaluation", "model": model, "test_loss": result.loss, "test_accuracy": result.accuracy}
        )

    def _write(self, name: str, mine: bool, fields: dict[str, Any]) -> None:
        if not mine:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"{name}.jsonl", "a") as file:
                file.write(json.dumps(fields) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.folder}/{name}.jsonl: {error.strerror}") from None


class Stopwatch:
    """Wall seconds by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.mark = perf_counter()

    def lap(self, name: str | None = None) -> None:
        """Adds the time since the last lap to `name`; to nothing without one."""
        now = perf_counter()
        if name:
            self.seconds[name] += now - self.mark
        self.mark = now


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

    def epoch(self, epoch: Epoch) -> None:
        phase = self.recipe.large_batch if epoch.group is None else self.recipe.refine
        total = phase.epochs * phase.cycles
        name = epoch.phase if epoch.group is None else f"group {epoch.group}"
        test = f"  test {epoch.test.accuracy:.4f}" if epoch.test else ""
        says = f"train {epoch.train.accuracy:.4f}{test}  lr {epoch.learning_rate:.4g}  {epoch.images / epoch.train_seconds:,.0f} images/s"
        if self.live.disable:
            left = (total - epoch.epoch) * (epoch.train_seconds + epoch.evaluate_seconds)
            self.say(f"{name:<12} epoch {epoch.epoch:>3}/{total}  {says}  {_clock(left)} left in the phase")
        else:
            if name not in self.tasks:
                self.tasks[name] = self.live.add_task(name, total=total, says="")
            self.live.update(self.tasks[name], completed=epoch.epoch, says=says)


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
