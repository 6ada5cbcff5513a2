"""Stochastic Weight Averaging in Parallel (Gupta, Akle Serrano, DeCoste, arXiv 2001.02312)."""

from collections.abc import Generator

from torch import nn

from swap_hpc.average.batchnorm import refresh_batchnorm_
from swap_hpc.average.uniform import WeightSum, average_weights_
from swap_hpc.data.sampling import Key, Phase
from swap_hpc.parallel.grid import Ranks
from swap_hpc.train.events import Done, Event, part_name
from swap_hpc.train.fit import Refinement, fit
from swap_hpc.train.job import Job


def swap(model: nn.Module, job: Job, ranks: Ranks) -> Generator[Event, None, None]:
    """Trains `model`, in place: at the end it is the averaged one, alike on all ranks."""
    recipe = job.recipe

    # Phase 1: all ranks train one model, with large batches.
    yield from fit(model, job, recipe.large_batch, Key(recipe.seed, Phase.LARGE_BATCH), ranks.world)
    yield Done("large_batch", model)
    if recipe.refine.epochs == 0:
        return

    # Phase 2: each group refines a copy alone, with small batches in an order of its own. Nothing passes between groups
    # until they meet: at the end, and before it only where a recipe asks for it.
    copies = [Refinement(group, model, job, ranks.group) for group in ranks.groups]
    for meeting in job.meetings[job.met :]:
        for copy in copies:
            yield from copy.until(meeting.step)
            yield Done(part_name(copy.group), copy.model, meeting)
        yield Done("refine", model, meeting)

        # Phase 3: the groups' weights are averaged, and batch norm is estimated anew for them.
        total = WeightSum()
        for copy in copies:
            copy.add_to_(total)
        average_weights_(model, ranks.peers, total)
        yield Done("average", model, meeting)
        if (
            meeting.then == "go_on"
        ):  # not SWAP, but post-local SGD: back to phase 2, from the average
            due = ranks.world.any(job.control.due(meeting.saves))
            for copy in copies:
                yield copy.go_on_from_(model, due)
            yield Done("go_on", model, meeting)
            continue
        with job.autocast():
            refresh_batchnorm_(model, job.batchnorm_batches(ranks.world), ranks.world)
        yield Done("batchnorm", model, meeting)
