"""`checkpoint`: what saving costs, in seconds and as a share of a whole run of a recipe."""

import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from torch import nn

from swap_hpc.parallel.grid import Ranks, grid, node_of
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.markdown import markdown_table
from swap_hpc.recipe.phase import PHASE_1, refinement_of
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.training import LargeBatch, Refine
from swap_hpc.recipe.wording import count
from swap_hpc.run.checkpoint import Checkpoints
from swap_hpc.run.prepare import prepare
from swap_hpc.train.events import Epoch, SavePoint
from swap_hpc.train.fit import fit
from swap_hpc.train.job import Job

SAVES = 20


@dataclass(frozen=True)
class Cost:
    """What a phase of a run costs a rank; the slowest rank counts."""

    mib: float  # of a save's file
    seconds: list[float]  # per save, ascending
    epoch_seconds: float  # training and evaluation
    epochs: int  # in a whole run, with those of all groups that the rank refines in turn
    saves: int  # in a whole run

    @property
    def saving(self) -> float:
        """Seconds of all saves of a run."""
        return self.saves * median(self.seconds)

    @property
    def training(self) -> float:
        """Seconds of all epochs of a run, with their evaluations."""
        return self.epochs * self.epoch_seconds


def report(recipe: Recipe, folder: Path, world: Team) -> str:
    """Train an epoch of each phase, save its end 20 times, and return what that makes of a run.

    Args:
        recipe: of the run.
        folder: where the saves go, in a new folder that is removed again.
        world: all ranks.
    """
    with node_of(world) as node, grid(world, recipe.groups) as ranks:
        job, model = prepare(recipe, world, node)
        # The first rank makes the folder; `first` returns None on the others.
        made = world.broadcast(world.first(lambda: _empty_folder(folder)) or "")
        checkpoints = Checkpoints(Path(made), recipe)
        costs = {}
        if recipe.large_batch.epochs:
            costs["large_batch"] = _measure(model, job, recipe.large_batch, ranks, checkpoints)
        if recipe.refine.epochs:
            costs["refine"] = _measure(deepcopy(model), job, recipe.refine, ranks, checkpoints)
        checkpoints.end(world)
    title = f"{recipe.name} on {count(world.size, 'rank')}, {SAVES} saves into {folder}"
    return f"{title}\n\n{_table(costs)}"


def _table(costs: dict[str, Cost]) -> str:
    run = sum(cost.training + cost.saving for cost in costs.values())
    rows = []
    for phase, cost in costs.items():
        least, most = cost.seconds[0], cost.seconds[-1]
        rows.append(
            (
                phase,
                f"{cost.mib:.1f}",
                f"{median(cost.seconds):.4f} ({least:.4f} to {most:.4f})",
                f"{cost.epoch_seconds:.2f}",
                f"{cost.saves}",
                f"{100 * cost.saving / run:.3f} %",
            )
        )
    head = (
        "phase",
        "MiB per file",
        "seconds per save: median (least to most)",
        "seconds per epoch",
        "saves in a run",
        "share of the run",
    )
    total = 100 * sum(cost.saving for cost in costs.values()) / run
    return f"{markdown_table(head, rows)}\n\nshare of the run: {total:.3f} %"


def _empty_folder(inside: Path) -> str:
    inside.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix="saves-", dir=inside)


def _measure(
    model: nn.Module, job: Job, phase: LargeBatch | Refine, ranks: Ranks, checkpoints: Checkpoints
) -> Cost:
    """Train the phase's first epoch, and save its end `SAVES` times. Collective over the world."""
    is_first = isinstance(phase, LargeBatch)
    part = PHASE_1 if is_first else refinement_of(ranks.groups[0])
    team = ranks.world if is_first else ranks.group
    events = fit(model, job, part, team)
    epoch_seconds, point = _first_epoch(events)
    seconds = []
    for _ in range(SAVES):
        ranks.world.barrier()
        begin = perf_counter()
        checkpoints.save(point, {"lines": []}, team)
        seconds.append(ranks.world.maximum(perf_counter() - begin)[0])
    files = checkpoints.folder.glob(f"{part.name}-*.safetensors")
    size = sum(path.stat().st_size for path in files)
    events.close()
    ranks.world.barrier()  # no rank begins the next phase before all have left this one

    in_turn = 1 if is_first else len(ranks.groups)
    epochs = phase.epochs * phase.cycles * in_turn
    settings = job.recipe.checkpoint
    within_epoch = int(epoch_seconds / (60 * settings.minutes)) if settings.minutes else 0
    at_ends = settings.saves(epochs, epoch_seconds) or 1  # the end of a phase is always saved
    return Cost(
        mib=size / 2**20,
        seconds=sorted(seconds),
        epoch_seconds=ranks.world.maximum(epoch_seconds)[0],
        epochs=epochs,
        saves=epochs * within_epoch + at_ends,
    )


def _first_epoch(events: Iterator[Epoch | SavePoint]) -> tuple[float, SavePoint]:
    """Run a phase up to the end of its first epoch.

    Returns:
        The seconds of the epoch, with its evaluation, and the save point at its end.
    """
    seconds = 0.0
    for event in events:
        if isinstance(event, Epoch):
            seconds = event.train_seconds + event.evaluate_seconds
        elif event.at.epoch == 1:
            return seconds, event
    raise AssertionError("a phase ended before its first epoch did")
