"""Stochastic Weight Averaging in Parallel (Gupta, Akle Serrano, DeCoste, arXiv 2001.02312)."""

from collections.abc import Generator

from torch import nn

from swap_hpc.average.uniform import average_weights_
from swap_hpc.parallel.grid import Ranks
from swap_hpc.recipe.phase import PHASE_1
from swap_hpc.train.events import (
    FROM_THE_BEGINNING,
    Averaged,
    Event,
    LargeBatchEnded,
    Refreshed,
    Saves,
)
from swap_hpc.train.fit import fit
from swap_hpc.train.job import Job
from swap_hpc.train.refinement import Refinement, arrive, weights_of
from swap_hpc.train.sync import synchronize


def swap(
    model: nn.Module, job: Job, ranks: Ranks, resume_from: Saves = FROM_THE_BEGINNING
) -> Generator[Event, None, None]:
    """Train `model`, as built on this rank's device, in place; collective over all ranks.

    At the end it is the averaged model (that of phase 1 if `refine.epochs` is 0), the same on all
    ranks. The events on the way are those of `swap_hpc.train.events`; errors are those of `fit`.
    """
    recipe = job.recipe

    # Phase 1: all ranks train one model, with large batches.
    yield from fit(model, job, PHASE_1, ranks.world, resume_from)
    yield LargeBatchEnded(model)
    if recipe.refine.epochs == 0:
        return

    # Phase 2: each group refines a copy of it alone, with small batches in an order of its own.
    # Nothing passes between the groups before the end, unless a recipe asks for sync points.
    copies = [Refinement(group, model, job, ranks.group, resume_from) for group in ranks.groups]
    *on_the_way, end = job.sync_points
    for sync in on_the_way[resume_from.synced :]:
        yield from synchronize(model, copies, sync, job, ranks)
    yield from arrive(copies, end)

    # Phase 3: the copies' weights are averaged, and batch norm is re-estimated for the average.
    average_weights_(model, ranks.peers, weights_of(copies))
    yield Averaged(model, end)
    job.refresh_batchnorm_(model, ranks.world)
    yield Refreshed(model, end)
