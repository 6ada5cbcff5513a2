"""What a job does of a run: all of it, or one part, while other jobs do the others in the same folder.

Eight small jobs may start sooner than one large one: a job for phase 1, then one for each group, then one that averages.
"""

from dataclasses import dataclass
from typing import Literal

from swap_hpc.errors import UserError
from swap_hpc.recipe.schema import LargeBatch, Recipe, Refine

PhaseChoice = Literal["large_batch", "refine", "average"]


@dataclass(frozen=True)
class Part:
    phase: PhaseChoice | None = None  # None: the whole run
    group: int | None = None  # the one whose refinement it is

    @property
    def last(self) -> str | None:
        """The `Done` that ends the job before the run is complete."""
        return None if self.phase == "average" else self.phase

    def needs(self, part: str) -> bool:
        """Whether another job must have brought a part of the run ("large_batch", "group-000" ...) to its end."""
        return self.phase == "average" or (self.phase == "refine" and part == "large_batch")


WHOLE = Part()


def check_part(part: Part, recipe: Recipe) -> None:
    """Raises UserError where a recipe has no such part."""
    if part.phase == "refine" and part.group is None:
        raise UserError(
            f"--phase refine needs --group, one of 0 to {recipe.groups - 1}: the group that this job refines"
        )
    if part.group is not None and part.phase != "refine":
        raise UserError(f"--group {part.group} belongs to --phase refine")
    if part.group is not None and not 0 <= part.group < recipe.groups:
        raise UserError(f"--group {part.group}: {recipe.name} has groups 0 to {recipe.groups - 1}")
    if part.phase and not recipe.refine.epochs and part.phase != "large_batch":
        raise UserError(
            f"--phase {part.phase}, but refine.epochs = 0: there is nothing to refine and average"
        )
    if part.phase and recipe.refine.evaluate_average:
        raise UserError(
            "groups refined by jobs of their own cannot meet on the way: --set refine.evaluate_average=0 for all of them"
        )
    if part.phase and recipe.refine.average_every_steps:
        raise UserError(
            "groups that go on from their average are one job: no --phase with refine.average_every_steps"
        )
    if part.phase == "large_batch" and not recipe.large_batch.epochs:
        raise UserError(
            "--phase large_batch, but large_batch.epochs = 0: begin with --phase refine"
        )


def check_ranks(
    recipe: Recipe, ranks: int, part: Part = WHOLE, phase_1_is_over: bool = False
) -> None:
    """Raises UserError where that many ranks cannot do `part` of `recipe`, or what of it is left."""
    groups = recipe.groups
    if part.phase in (None, "average") and ranks % groups and groups % ranks:
        near = [n for n in range(1, 4 * groups + 1) if n % groups == 0 or groups % n == 0]
        raise UserError(
            f"{ranks} ranks cannot share {groups} groups: start a multiple or a divisor of the groups ({', '.join(map(str, near))})"
        )
    if part.phase in (None, "large_batch") and recipe.large_batch.epochs and not phase_1_is_over:
        _check_large_batch(recipe, ranks)
    if part.phase in (None, "refine") and recipe.refine.epochs:
        _check_share("refine", recipe.refine, ranks if part.phase else max(1, ranks // groups))


def _check_large_batch(recipe: Recipe, ranks: int) -> None:
    batch_size, wanted = recipe.large_batch.batch_size, recipe.large_batch.batchnorm_batch_size
    _check_share("large_batch", recipe.large_batch, ranks)
    share = batch_size // (ranks * recipe.large_batch.accumulate)
    if wanted is not None and share != wanted:
        raise UserError(
            f"large_batch.batchnorm_batch_size = {wanted}, but {ranks} ranks share batches of {batch_size} as {share} each: "
            f"start {batch_size // (wanted * recipe.large_batch.accumulate)} ranks, or set the field to {share} for another result"
        )


def _check_share(name: str, phase: LargeBatch | Refine, ranks: int) -> None:
    batch_size, parts = phase.batch_size, ranks * phase.accumulate
    if batch_size % parts:
        near = [b for b in (batch_size // parts * parts, (batch_size // parts + 1) * parts) if b]
        times = f" times {name}.accumulate = {phase.accumulate}" if phase.accumulate > 1 else ""
        raise UserError(
            f"{name}.batch_size = {batch_size} does not divide by its {ranks} ranks{times}: "
            f"--set {name}.batch_size={' or '.join(map(str, near))}"
        )
