"""What a job does of a run: all of it, or one part, while other jobs do the others.

All of them work in one folder. Eight small jobs may start sooner than one large one: a job for
phase 1, then one for each group, then one that averages.
"""

from typing import Literal

from swap_hpc.errors import UserError
from swap_hpc.recipe.phase import PHASE_1, Part, Phase
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.training import LargeBatch, Refine


def chosen_part(phase: str | None, group: int | None, recipe: Recipe) -> Part | None:
    """Return the part of a run that the command line asks for; None is the whole run.

    Args:
        phase: the value of `--phase`.
        group: the value of `--group`.
        recipe: the run's.

    Raises:
        UserError: the recipe has no such part.
    """
    groups = f"0 to {recipe.groups - 1}"
    if group is not None and phase != Phase.REFINE:
        raise UserError(f"--group {group} belongs to --phase refine")
    if phase is None:
        return None
    part = Part(Phase(phase), group)
    if part.phase is Phase.REFINE and group is None:
        raise UserError(
            f"--phase refine needs --group, one of {groups}: the group that this job refines"
        )
    if group is not None and not 0 <= group < recipe.groups:
        raise UserError(f"--group {group}: {recipe.name} has groups {groups}")
    if part.phase is not Phase.LARGE_BATCH and not recipe.refine.epochs:
        raise UserError(
            f"--phase {phase}, but refine.epochs = 0: there is nothing to refine and average"
        )
    if recipe.refine.evaluate_average:
        raise UserError(
            "groups that are refined by jobs of their own cannot be averaged on the way: "
            "--set refine.evaluate_average=0 for all of them"
        )
    if recipe.refine.average_every_steps:
        raise UserError(
            "groups that continue from their average are one job: "
            "no --phase with refine.average_every_steps"
        )
    if part.phase is Phase.LARGE_BATCH and not recipe.large_batch.epochs:
        raise UserError(
            "--phase large_batch, but large_batch.epochs = 0: begin with --phase refine"
        )
    return part


def does(chosen: Part | None, phase: Phase) -> bool:
    """Tell whether a job does a phase, or some of it."""
    return chosen is None or chosen.phase is phase


def refines_one_group(chosen: Part | None) -> bool:
    """Tell whether a job refines a group while other jobs refine the others."""
    return chosen is not None and chosen.phase is Phase.REFINE


def needs(chosen: Part | None, part: Part) -> bool:
    """Tell whether a job begins where another job must have ended a part of the run."""
    if chosen is None:
        return False
    return chosen.phase is Phase.AVERAGE or (refines_one_group(chosen) and part == PHASE_1)


def check_ranks(
    recipe: Recipe, ranks: int, chosen: Part | None = None, phase_1_is_over: bool = False
) -> None:
    """Check that a number of ranks can do what a job has to do.

    Args:
        recipe: the run's.
        ranks: all ranks of the job.
        chosen: the part of the run that the job does; None is the whole run.
        phase_1_is_over: phase 1 has ended in an earlier job.

    Raises:
        UserError: another number of ranks, or another batch size, is needed.
    """
    groups = recipe.groups
    averages = does(chosen, Phase.AVERAGE)
    if averages and ranks % groups and groups % ranks:
        near = [n for n in range(1, 4 * groups + 1) if n % groups == 0 or groups % n == 0]
        raise UserError(
            f"{ranks} ranks cannot share {groups} groups: start a multiple or a divisor of the "
            f"groups ({', '.join(map(str, near))})"
        )
    if does(chosen, Phase.LARGE_BATCH) and recipe.large_batch.epochs and not phase_1_is_over:
        _check_large_batch(recipe, ranks)
        _check_pairs("large_batch", recipe, ranks)
    if does(chosen, Phase.REFINE) and recipe.refine.epochs:
        per_group = ranks if chosen else max(1, ranks // groups)
        _check_share("refine", recipe.refine, per_group)
        _check_pairs("refine", recipe, per_group)


def _check_large_batch(recipe: Recipe, ranks: int) -> None:
    batch_size, wanted = recipe.large_batch.batch_size, recipe.large_batch.batchnorm_batch_size
    _check_share("large_batch", recipe.large_batch, ranks)
    share = batch_size // (ranks * recipe.large_batch.accumulate)
    if wanted is not None and share != wanted:
        needed = batch_size // (wanted * recipe.large_batch.accumulate)
        raise UserError(
            f"large_batch.batchnorm_batch_size = {wanted}, but {ranks} ranks share batches of "
            f"{batch_size} as {share} each: start {needed} ranks, or set the field to {share} for "
            "another result"
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


def _check_pairs(name: Literal["large_batch", "refine"], recipe: Recipe, ranks: int) -> None:
    """Check that each rank's share consists of pairs, where images are mixed."""
    phase: LargeBatch | Refine = getattr(recipe, name)
    batch_size, share = phase.batch_size, phase.batch_size // ranks
    even = 2 * ranks * phase.accumulate
    if recipe.augment.mixes and share % 2:
        raise UserError(
            f"{name}.batch_size = {batch_size}: augment.mixup and augment.cutmix mix pairs of "
            f"images, and each of {ranks} ranks would hold {share}: "
            f"--set {name}.batch_size={(batch_size // even + 1) * even}"
        )
