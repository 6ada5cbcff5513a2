"""Where the parts of a run resume from, and what they forget when they do."""

import json
from dataclasses import dataclass

from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Part, Phase, refinement_of
from swap_hpc.run.assignment import Assignment
from swap_hpc.run.checkpoint import Checkpoints
from swap_hpc.run.checks import check_ranks, needs
from swap_hpc.run.lines import Line
from swap_hpc.run.record import Recorder, averages_file
from swap_hpc.train.events import Position, SavePoint

NOWHERE = Position(-1, 0)  # before every save


@dataclass(frozen=True)
class Resume:
    """The saves of a run, as `swap()` asks for them."""

    assignment: Assignment
    recorder: Recorder
    # Groups that continue from their average have to stand at one step: this one. None: each
    # group resumes from its own newest save.
    common: Position | None
    synced: int  # sync points that the groups have passed

    def load(self, part: Part, team: Team) -> SavePoint | None:
        """Return the save point that a part resumes from, and take over its record.

        Raises:
            UserError: on all ranks, another job must end the part first, or this number of ranks
                cannot train it.
            RunError: on all ranks, no save of the part can be used.
        """
        at = self.common if part.phase is Phase.REFINE else None
        saved = self.assignment.checkpoints.load(part, team, at)
        has_ended = saved is not None and saved.point.ended
        if needs(self.assignment.chosen, part) and not has_ended:
            raise UserError(
                f"{self.assignment.out}: {part.name} has not ended, and this job does not train "
                f"it: first {_options(part)}"
            )
        if part == PHASE_1 and not has_ended:
            # The command line skips this check where large_batch.safetensors exists, but the save
            # that belongs to it may be lost, and the number of ranks another.
            check_ranks(self.assignment.job.recipe, team.size, self.assignment.chosen)
        self.recorder.resume(part, saved)
        return saved.point if saved else None


def _options(part: Part) -> str:
    """Return the options of the job that trains a part."""
    group = "" if part.group is None else f" --group {part.group}"
    return f"--phase {part.phase}{group}"


def saved_averages(checkpoints: Checkpoints, world: Team) -> list[Line]:
    """Return the evaluations of the average before the end, so far; collective over `world`."""

    def read() -> list[Line]:
        file = averages_file(checkpoints)
        try:
            lines: list[Line] = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {file}: {error}") from None
        return lines

    return world.broadcast(world.first(read) or [])


def resume(assignment: Assignment, recorder: Recorder) -> Resume:
    """Find out where a run resumes; collective over the world.

    Groups that continue from their average go back to the newest sync point that all of them have
    saved; their saves after it are removed.
    """
    job, ranks = assignment.job, assignment.ranks
    if not job.recipe.refine.average_every_steps:
        return Resume(assignment, recorder, None, len(recorder.averages))
    parts = [refinement_of(group) for group in ranks.groups]
    common = assignment.checkpoints.common(parts, ranks.world) or NOWHERE
    for part in parts:
        assignment.checkpoints.forget_after(common, part, ranks.group)
    steps = common.epoch * job.steps(job.recipe.refine) + common.step
    over = [sync for sync in job.sync_points if sync.then == "continue" and sync.step <= steps]
    return Resume(assignment, recorder, common, len(over))
