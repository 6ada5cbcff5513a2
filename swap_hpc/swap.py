"""Stochastic Weight Averaging in Parallel (Gupta, Akle Serrano, DeCoste, arXiv 2001.02312)."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from swap_hpc.averaging import WeightSum, average_weights_, refresh_batchnorm_
from swap_hpc.data.sampling import Key, Phase
from swap_hpc.fit import Epoch, Job, fit
from swap_hpc.ranks import Ranks


@dataclass(frozen=True)
class Done:
    """A part of the run is done: its name, and the model as it left it."""

    what: str  # "large_batch", "group-000" ..., "refine" (all of this rank's groups), "average", "batchnorm"
    model: nn.Module


Event: TypeAlias = Epoch | Done


def swap(model: nn.Module, job: Job, ranks: Ranks) -> Iterator[Event]:
    """Trains `model`, in place: at the end it is the averaged one, alike on all ranks."""
    recipe = job.recipe

    # Phase 1: all ranks train one model, with large batches.
    yield from fit(model, job, recipe.large_batch, Key(recipe.seed, Phase.LARGE_BATCH), ranks.world)
    yield Done("large_batch", model)
    if recipe.refine.epochs == 0:
        return

    # Phase 2: each group refines a copy alone, with small batches in an order of its own. Nothing passes between groups.
    total = WeightSum()
    for group in ranks.groups:
        copy = deepcopy(model)
        for epoch in fit(copy, job, recipe.refine, Key(recipe.seed, Phase.REFINE, group), ranks.group):
            if epoch.ends_cycle:
                total.add_(copy)
            yield epoch
        yield Done(f"group-{group:03d}", copy)
    yield Done("refine", model)

    # Phase 3: the groups' weights are averaged, and batch norm is estimated anew for them.
    average_weights_(model, ranks.peers, total)
    yield Done("average", model)
    with job.autocast():
        refresh_batchnorm_(model, job.batchnorm_batches(ranks.world), ranks.world)
    yield Done("batchnorm", model)
