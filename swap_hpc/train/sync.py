"""Sync points of the groups before the end of phase 2, where a recipe asks for them."""

from collections.abc import Iterator, Sequence

from torch import nn

from swap_hpc.average.uniform import average_weights_
from swap_hpc.parallel.grid import Ranks
from swap_hpc.train.events import Averaged, Continued, Event, Refreshed, SyncPoint
from swap_hpc.train.job import Job
from swap_hpc.train.refinement import Refinement, arrive, weights_of


def synchronize(
    model: nn.Module, copies: Sequence[Refinement], sync: SyncPoint, job: Job, ranks: Ranks
) -> Iterator[Event]:
    """Train the copies up to a sync point, then average their weights into `model`.

    With `refine.average_every_steps` the copies continue from the average: post-local SGD (Lin et
    al., arXiv 1808.07217). With `refine.evaluate_average` the average is only evaluated, and the
    copies continue from their own weights.
    """
    yield from arrive(copies, sync)
    average_weights_(model, ranks.peers, weights_of(copies))
    yield Averaged(model, sync)
    if sync.then == "continue":
        # all groups save here or none does: a run resumes all of them from one sync point
        due = ranks.world.any(job.control.due(sync.save_is_due))
        for copy in copies:
            yield copy.continue_from_(model, due)
        yield Continued(sync)
    else:
        job.refresh_batchnorm_(model, ranks.world)
        yield Refreshed(model, sync)
