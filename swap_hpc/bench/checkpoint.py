"""What saving costs: seconds per save, and its share of a whole run of a recipe."""

import tempfile
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
from swap_hpc.recipe.schema import LargeBatch, Recipe, Refine
from swap_hpc.run.checkpoint import Checkpoints
from swap_hpc.run.prepare import prepare
from swap_hpc.train.events import Epoch, SavePoint
from swap_hpc.train.fit import fit
from swap_hpc.train.job import Job

SAVES = 20


@dataclass(frozen=True)
class Cost:
    """Of one phase: the slowest rank's."""

    mib: float
    seconds: list[float]  # of each save, ascending
    epoch_seconds: float  # training and evaluation
    epochs: int  # of a whole run, one after the other on a rank
    saves: int

    @property
    def saving(self) -> float:
        return self.saves * median(self.seconds)

    @property
    def training(self) -> float:
        return self.epochs * self.epoch_seconds


def report(recipe: Recipe, folder: Path, world: Team) -> str:
    """Trains one epoch of each phase, saves its end 20 times into `folder`, and tells what that makes of a whole run."""
    with node_of(world) as node, grid(world, recipe.groups) as ranks:
        job, model = prepare(recipe, world, node)
        checkpoints = Checkpoints(
            Path(world.broadcast(world.first(lambda: _empty_folder(folder)) or "")), recipe
        )
        costs = (
            {"large_batch": _measure(model, job, recipe.large_batch, ranks, checkpoints)}
            if recipe.large_batch.epochs
            else {}
        )
        if recipe.refine.epochs:
            costs["refine"] = _measure(deepcopy(model), job, recipe.refine, ranks, checkpoints)
        checkpoints.remove(world)
    run = sum(cost.training + cost.saving for cost in costs.values())
    rows = []
    for phase, cost in costs.items():
        spread = f"{median(cost.seconds):.4f} ({cost.seconds[0]:.4f} to {cost.seconds[-1]:.4f})"
        shares = (f"{cost.epoch_seconds:.2f}", f"{cost.saves}", f"{100 * cost.saving / run:.3f} %")
        rows.append((phase, f"{cost.mib:.1f}", spread, *shares))
    total = 100 * sum(cost.saving for cost in costs.values()) / run
    head = (
        "phase",
        "MiB per file",
        "seconds per save: median (least to most)",
        "seconds per epoch",
        "saves in a run",
        "share of the run",
    )
    return f"{recipe.name} on {world.size} ranks, {SAVES} saves into {folder}\n\n{markdown_table(head, rows)}\n\nshare of the run: {total:.3f} %"


def _empty_folder(inside: Path) -> str:
    inside.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix="saves-", dir=inside)


def _measure(
    model: nn.Module, job: Job, phase: LargeBatch | Refine, ranks: Ranks, checkpoints: Checkpoints
) -> Cost:
    first = isinstance(phase, LargeBatch)
    part = PHASE_1 if first else refinement_of(ranks.groups[0])
    team = ranks.world if first else ranks.group
    epoch_seconds = 0.0
    events = fit(model, job, part, team)
    for event in events:
        if isinstance(event, Epoch):
            epoch_seconds = event.train_seconds + event.evaluate_seconds
        elif isinstance(event, SavePoint) and event.at.epoch == 1:
            break
    assert isinstance(event, SavePoint)
    seconds = []
    for _ in range(SAVES):
        ranks.world.barrier()
        begin = perf_counter()
        checkpoints.save(event, {"lines": []}, team)
        seconds.append(ranks.world.maximum(perf_counter() - begin)[0])
    size = sum(
        path.stat().st_size for path in checkpoints.folder.glob(f"{part.name}-*.safetensors")
    )
    events.close()
    ranks.world.barrier()
    epochs = phase.epochs * phase.cycles * (1 if first else len(ranks.groups))
    minutes = job.recipe.checkpoint.minutes
    inside = int(epoch_seconds / (60 * minutes)) if minutes else 0
    saves = epochs * inside + (job.recipe.checkpoint.saves(epochs, epoch_seconds) or 1)
    return Cost(size / 2**20, sorted(seconds), ranks.world.maximum(epoch_seconds)[0], epochs, saves)
