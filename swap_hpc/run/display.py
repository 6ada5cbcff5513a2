"""What a person sees of a run: a progress bar on a terminal, lines in a log."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from swap_hpc.parallel.grid import Ranks
from swap_hpc.parallel.launcher import launched
from swap_hpc.recipe.metrics import SHARES, shown
from swap_hpc.recipe.phase import PHASE_1
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.wording import count
from swap_hpc.train.events import Epoch, Evaluation, SavePoint


class Screen(Console):
    """A console that raises BrokenPipeError when nobody reads it any more; rich's would exit."""

    def on_broken_pipe(self) -> None:
        error = sys.exc_info()[1]
        assert error is not None
        raise error


class Display:
    """Shows epochs: as one bar per part of the run on a terminal, else as one line each.

    Silent on all ranks but the first.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, console: Console):
        self.recipe = recipe
        self.is_first = ranks.world.rank == 0
        self.console = console
        self.noun = "images"  # what the data set's samples are called
        shows_bars = self.is_first and console.is_terminal and _on_terminal()
        self.bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(20),
            TextColumn("{task.completed}/{task.total}  {task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not shows_bars,
        )
        self.tasks: dict[str, TaskID] = {}  # part of the run -> its bar

    @contextmanager
    def running(self) -> Iterator["Display"]:
        """Keep the bars on the screen."""
        with self.bars:
            yield self

    def say(self, text: str) -> None:
        """Print a line, from the first rank."""
        if self.is_first:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def resumed(self, point: SavePoint) -> None:
        """Show where a part of the run goes on."""
        where = f"after epoch {point.at.epoch}, step {point.at.step}"
        self.say(f"{point.part} goes on {'at its end' if point.ended else where}")

    def average(self, epoch: int, split: str, result: Evaluation) -> None:
        """Show the average of the groups before the end of their refinement."""
        self.say(f"{'average':<12} epoch {epoch:>3}  {_main(split, result)}")

    def epoch(self, epoch: Epoch) -> None:
        """Show an epoch, and that it is the last one if its accuracy ends the phase."""
        name = str(epoch.part)
        phase = self.recipe.large_batch if epoch.part == PHASE_1 else self.recipe.refine
        total, figures = phase.epochs * phase.cycles, _figures(epoch, self.noun)
        if self.bars.disable:
            seconds_left = (total - epoch.epoch) * (epoch.train_seconds + epoch.evaluate_seconds)
            self.say(
                f"{name:<12} epoch {epoch.epoch:>3}/{total}  {figures}  "
                f"{_clock(seconds_left)} left in the phase"
            )
        else:
            if name not in self.tasks:
                self.tasks[name] = self.bars.add_task(name, total=total, figures="")
            self.bars.update(self.tasks[name], completed=epoch.epoch, figures=figures)
        if skipped := epoch.updates.skipped:
            self.say(
                f"{name} skipped {count(skipped, 'step')} in epoch {epoch.epoch}: gradients "
                f"overflowed float16; the loss scale is now {epoch.updates.loss_scale:g}"
            )
        stop = phase.stop_accuracy
        if stop is not None and epoch.train.main >= stop and epoch.epoch < total:
            self.say(f"{name} ends here: large_batch.stop_accuracy = {stop} is reached")


def _figures(epoch: Epoch, noun: str) -> str:
    others = {"validation": epoch.validation, "test": epoch.test}
    test = "".join(f"  {_main(split, each)}" for split, each in others.items() if each)
    ema = "".join(f"  EMA {_main(split, each)}" for split, each in epoch.ema.items())
    speed = epoch.images / epoch.train_seconds
    rate = f"lr {epoch.learning_rate:.4g}  {speed:,.0f} {noun}/s"
    return f"{_main('train', epoch.train)}{test}{ema}  {rate}"


def _main(split: str, result: Evaluation) -> str:
    """Return the main metric by its name; accuracies are fractions here."""
    name = next(iter(result.metrics))
    digits = f"{result.main:.4f}" if name in SHARES else shown(name, result.main)
    return f"{split} {name} {digits}"


def _on_terminal() -> bool:
    """Return whether this process's output is shown on a terminal.

    Some launchers give each rank a terminal of its own and may still write to a log themselves:
    where there is a launcher, its output counts.
    """
    if launched() is None:
        return sys.stdout.isatty()
    try:
        output = os.readlink(f"/proc/{os.getppid()}/fd/1")
    except OSError:
        return False
    return output.startswith(("/dev/pts/", "/dev/tty"))


def _clock(seconds: float) -> str:
    """Return a time as hours, minutes and seconds: "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
