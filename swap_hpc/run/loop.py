"""The loop of a run: each event of `swap()` is recorded, until the job has done its part."""

from typing import Any

from torch import nn

from swap_hpc.errors import Stopped
from swap_hpc.recipe.phase import Part, Phase
from swap_hpc.run.assignment import Assignment
from swap_hpc.run.record import Recorder
from swap_hpc.run.resume import Resume
from swap_hpc.swap import swap
from swap_hpc.train.events import Event, GroupsArrived, LargeBatchEnded


def train_and_record(
    model: nn.Module, assignment: Assignment, saves: Resume, recorder: Recorder
) -> dict[str, Any] | None:
    """Train `model` as a recipe says, from where its saves are.

    Args:
        model: as built, on this rank's device; it is trained in place.
        assignment: this job's share of the run.
        saves: where the run resumes from.
        recorder: writes what happens.

    Returns:
        What `result.json` holds, on the first rank, and nothing on the others; None where this
        job's part does not complete the run.

    Raises:
        Diverged: as `swap` does.
        RunError: as `swap` and `Recorder.record` do.
        Stopped: on all ranks, one of them was asked to stop, and all is saved.
        UserError: as `Recorder.record` and `Resume.load` do.
    """
    recorder.begin()
    events = swap(model, assignment.job, assignment.ranks, saves)
    try:
        for event in events:
            recorder.record(event)
            if _ends(assignment.chosen, event):
                recorder.journal.end()
                return None
    except Stopped:
        events.close()  # all ranks leave training together
        raise
    return recorder.result(model)


def _ends(chosen: Part | None, event: Event) -> bool:
    """Tell whether an event ends a job that does only a part of the run."""
    match event:
        case LargeBatchEnded():
            return chosen is not None and chosen.phase is Phase.LARGE_BATCH
        case GroupsArrived():
            return chosen is not None and chosen.phase is Phase.REFINE
    return False
