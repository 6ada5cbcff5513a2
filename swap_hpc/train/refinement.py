"""Phase 2 of one group: its copy of the model, trained from sync point to sync point."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from swap_hpc.average.kinds import averaged_tensors
from swap_hpc.average.uniform import WeightSum
from swap_hpc.errors import RunError
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import assign_
from swap_hpc.recipe.phase import refinement_of
from swap_hpc.train.events import (
    Epoch,
    Event,
    GroupArrived,
    GroupsArrived,
    SavePoint,
    Saves,
    SyncPoint,
)
from swap_hpc.train.fit import check_finite, fit
from swap_hpc.train.job import Job


class Refinement:
    """A group's copy of a model on its way through phase 2, trained in parts."""

    def __init__(self, group: int, model: nn.Module, job: Job, team: Team, resume_from: Saves):
        """
        Args:
            group: the group, from 0.
            model: the model at the end of phase 1; a copy is taken when training begins.
            job: the run's.
            team: the ranks that train the copy together.
            resume_from: where the group resumes from.
        """
        self.part = refinement_of(group)
        # The model of phase 1 until training begins, then this group's copy of it: a group that
        # waits for its turn holds none in memory.
        self.model = model
        self.cycle_sum = WeightSum()  # the weights at the ends of the cycles so far
        self.steps = 0  # done since the refinement began
        self._job, self._team, self._resume_from = job, team, resume_from
        self._last: SavePoint | None = None  # its tensors are those of the copy
        self._events: Generator[Epoch | SavePoint, None, None] | None = None

    def train_until(self, step: int) -> Iterator[Epoch | SavePoint]:
        """Train until that many steps of the refinement are done; do nothing if they are.

        Raises:
            RunError: the copy has already passed that step, since it resumed from a later save.
        """
        job = self._job
        if self._events is None:
            self.model = job.copy_of(self.model)
            self._events = fit(
                self.model, job, self.part, self._team, self._resume_from, self.cycle_sum
            )
        steps_per_epoch = job.steps(job.recipe.refine)
        events = self._events if self.steps < step else iter(())
        try:
            for event in events:
                yield event
                if isinstance(event, SavePoint):
                    self._last = event
                    self.steps = event.at.epoch * steps_per_epoch + event.at.step
                    # After its last event training is left to end: it shuts Horovod down.
                    if step <= self.steps and not event.ended:
                        break
        except GeneratorExit:
            self._events.close()
            raise
        if self.steps > step:
            raise RunError(
                f"{self.part} is at step {self.steps}, past the sync point at step {step}: "
                "the record of the sync points was lost"
            )
        self.model.zero_grad()  # frees the memory of the gradients

    def add_to_(self, total: WeightSum) -> None:
        """Add to `total` this copy's weights at the end of each cycle that is over.

        Where a cycle is under way, its present weights are added, too.
        """
        total.merge_(self.cycle_sum)
        refine = self._job.recipe.refine
        is_inside_a_cycle = self.steps % (self._job.steps(refine) * refine.epochs) != 0
        if is_inside_a_cycle:
            total.add_(self.model)

    @torch.no_grad()
    def continue_from_(self, model: nn.Module, due: bool) -> SavePoint:
        """Give the copy the averaged weights of `model`, and return the point where it stands.

        The copy keeps its own optimizer state and batch-norm statistics.

        Args:
            model: holds the average of the groups' weights.
            due: the point is to be saved.

        Raises:
            Diverged: a weight is not finite, and the point is due to be saved.
        """
        assert self._last is not None
        weights = averaged_tensors(self.model)
        for name, tensor in averaged_tensors(model).items():
            assign_(weights[name], tensor)
        if due:
            where = f"the groups' average after step {self.steps} of the refinement"
            check_finite(self._last, where)
        return replace(self._last, due=due)


def arrive(copies: Sequence[Refinement], sync: SyncPoint) -> Iterator[Event]:
    """Train this rank's copies up to a sync point, one after the other."""
    for copy in copies:
        yield from copy.train_until(sync.step)
        yield GroupArrived(copy.part, copy.model, sync)
    yield GroupsArrived(sync)


def weights_of(copies: Sequence[Refinement]) -> WeightSum:
    """Return the sum of all that this rank's copies contribute to an average."""
    total = WeightSum()
    for copy in copies:
        copy.add_to_(total)
    return total
