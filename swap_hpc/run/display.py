"""What a person sees of a run: a progress bar on a terminal, lines in a log."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from swap_hpc.parallel.grid import Ranks
from swap_hpc.parallel.launcher import launched
from swap_hpc.recipe.phase import PHASE_1
from swap_hpc.recipe.schema import Recipe
from swap_hpc.train.events import Epoch, Evaluation, SavePoint


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
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(20),
            TextColumn("{task.completed}/{task.total}  {task.fields[says]}"),
        )
        self.live = Progress(
            *columns,
            TimeRemainingColumn(),
            console=console,
            disable=not (self.speaks and console.is_terminal and _on_terminal()),
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
        where = f"after epoch {point.at.epoch}, step {point.at.step}"
        self.say(f"{point.part} goes on {'at its end' if point.ended else where}")

    def average(self, epoch: int, test: Evaluation) -> None:
        self.say(f"{'average':<12} epoch {epoch:>3}  test {test.accuracy:.4f}")

    def epoch(self, epoch: Epoch) -> None:
        phase = self.recipe.large_batch if epoch.part == PHASE_1 else self.recipe.refine
        total = phase.epochs * phase.cycles
        name = str(epoch.part)
        test = f"  test {epoch.test.accuracy:.4f}" if epoch.test else ""
        says = f"train {epoch.train.accuracy:.4f}{test}  lr {epoch.learning_rate:.4g}  {epoch.images / epoch.train_seconds:,.0f} images/s"
        if self.live.disable:  # a log
            left = (total - epoch.epoch) * (epoch.train_seconds + epoch.evaluate_seconds)
            self.say(
                f"{name:<12} epoch {epoch.epoch:>3}/{total}  {says}  {_clock(left)} left in the phase"
            )
        else:
            if name not in self.tasks:
                self.tasks[name] = self.live.add_task(name, total=total, says="")
            self.live.update(self.tasks[name], completed=epoch.epoch, says=says)
        if (
            epoch.epoch < total
            and phase.stop_accuracy is not None
            and epoch.train.accuracy >= phase.stop_accuracy
        ):
            self.say(
                f"{name} ends here: large_batch.stop_accuracy = {phase.stop_accuracy} is reached"
            )


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
