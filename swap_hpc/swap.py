"""Stochastic Weight Averaging in Parallel (Gupta, Akle Serrano, DeCoste, arXiv 2001.02312)."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from swap_hpc.averaging import WeightSum, average_weights_, refresh_batchnorm_
from swap_hpc.data.sampling import Key, Phase
from swap_hpc.events import Epoch, SavePoint, part_name
from swap_hpc.fit import Refinement, fit
from swap_hpc.job import Job
from swap_hpc.ranks import Ranks


@dataclass(frozen=True)
class Done:
    """A part of the run is done: its name, and the model as it left it."""

    what: str  # "large_batch", "group-000" ..., "refine" (all of this rank's groups), "average", "batchnorm"
    model: nn.Module
    epoch: int = 0  # of the refinement


Event: TypeAlias = Epoch | SavePoint | Done


def swap(model: nn.Module, job: Job, ranks: Ranks) -> Generator[Event, None, None]:
    """Trains `model`, in place: at the end it is the averaged one, alike on all ranks."""
    recipe = job.recipe

    # Phase 1: all ranks train one model, with large batches.
    yield from fit(model, job, recipe.large_batch, Key(recipe.seed, Phase.LARGE_BATCH), ranks.world)
    yield Done("large_batch", model)
    if recipe.refine.epochs == 0:
        return

    # Phase 2: each group refines a copy alone, with small batches in an order of its own. Nothing passes between groups
    # until they meet: at the end, and before it only where a recipe wants to see the averaged model on the way.
    copies = [Refinement(group, model, job, ranks.group) for group in ranks.groups]
    for epoch in recipe.refine.meetings[job.met :]:
        for copy in copies:
            yield from copy.until(epoch)
            yield Done(part_name(copy.group), copy.model, epoch)
        yield Done("refine", model, epoch)

        # Phase 3: the groups' weights are averaged, and batch norm is estimated anew for them.
        total = WeightSum()
        for copy in copies:
            copy.add_to_(total)
        average_weights_(model, ranks.peers, total)
        yield Done("average", model, epoch)
        with job.autocast():
            refresh_batchnorm_(model, job.batchnorm_batches(ranks.world), ranks.world)
        yield Done("batchnorm", model, epoch)
