"""One run: builds everything from a recipe, claims the run's folder, goes on where it stopped."""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from swap_hpc.data.sampling import Key
from swap_hpc.errors import UserError
from swap_hpc.parallel.atomic import write_json
from swap_hpc.parallel.grid import Ranks, grid, node_of, single_row
from swap_hpc.parallel.horovod import end_stalls
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Part, Phase, refinement_of
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run.adopt import adopt_large_batch
from swap_hpc.run.assignment import Assignment
from swap_hpc.run.best import check_best
from swap_hpc.run.board import check_tensorboard
from swap_hpc.run.checkpoint import Checkpoints
from swap_hpc.run.checks import does
from swap_hpc.run.claim import (
    check_data,
    claim,
    finished,
    leftovers,
    noting_divergence,
    take_over,
)
from swap_hpc.run.display import Display
from swap_hpc.run.dry_step import dry_step
from swap_hpc.run.ending import tell_launcher
from swap_hpc.run.extend import extend, is_extended, last_phase, saves_to_extend
from swap_hpc.run.folder import phase_1_is_over
from swap_hpc.run.idle_fields import idle_fields
from swap_hpc.run.initial import begin_with_weights_
from swap_hpc.run.introduction import introduction
from swap_hpc.run.job_facts import job_facts
from swap_hpc.run.lock import is_owned, owning
from swap_hpc.run.loop import train_and_record
from swap_hpc.run.own_files import remove_files
from swap_hpc.run.prepare import prepare
from swap_hpc.run.record import recorder_of
from swap_hpc.run.resume import resume, saved_averages
from swap_hpc.run.taking import AT_ONCE
from swap_hpc.run.tracker import check_tracker
from swap_hpc.run.watchdog import watching
from swap_hpc.train.control import Control
from swap_hpc.train.job import Job


def train(
    recipe: Recipe,
    out: Path,
    world: Team,
    console: Console,
    control: Control,
    started: float,
    chosen: Part | None = None,
    phase_1_of: Path | None = None,
    extends: Recipe | None = None,
) -> dict[str, Any] | None:
    """Run a recipe, or a part of it, on the ranks of `world`.

    A run that was stopped is resumed; a complete one is left as it is.

    Args:
        recipe: has passed `check_ranks`.
        out: the run's folder.
        world: all ranks of the job.
        console: where a person reads.
        control: its `stop` ends the run at the next step boundary.
        started: `perf_counter()` when the process began.
        chosen: the part of the run that this job does; None is the whole run.
        phase_1_of: the folder of a complete run whose phase 1 this run begins with.
        extends: the recipe of the complete run in `out` which this run goes on from; it has passed
            `check_extension`.

    Returns:
        What `result.json` holds, on the first rank, and nothing on the others; None where this
        job's part does not complete the run.

    Raises:
        UserError: before any training, the input is wrong.
        RunError: the run failed.
        Stopped: a rank was asked to stop, and all is saved.
    """
    with node_of(world) as node, _ranks(world, recipe, chosen) as ranks:
        display = Display(recipe, ranks, console)
        if not _is_to_extend(extends, recipe, out, world):
            result = _complete(recipe, out, world, display)
            if result is not None:
                _remove_leftovers(out, world)
                return result
        job, model = prepare(recipe, world, node)
        world.agree(partial(check_best, job))
        job = replace(job, control=control)
        display.noun = job.dataset.noun
        control.save_as(recipe.checkpoint)
        with owning(out, chosen, world, display.say, stop=lambda: control.stop):
            # again: a job that had the folder until now may have extended or completed the run
            before = extends if _is_to_extend(extends, recipe, out, world) else None
            if before is None:
                result = _complete(recipe, out, world, display)
                if result is not None:
                    return result
            checkpoints = Checkpoints(out / "checkpoints", recipe, job.header["data"])
            assignment = Assignment(job, ranks, out, chosen, checkpoints, display)
            notes = idle_fields(recipe, model)
            if phase_1_of is None:
                notes += begin_with_weights_(model, job, out, checkpoints, world)
            facts = job_facts(job, world, node)
            _check_start(job, out, world)
            if before is None:
                _take_over(assignment, model, phase_1_of, facts)
                is_over, begin = phase_1_is_over(out, world), _nothing
            else:
                is_over = last_phase(before) is Phase.REFINE
                begin = _extension(before, assignment, facts)
            for line in (*introduction(job, ranks, out), *notes):
                display.say(line)
            is_over = is_over or phase_1_of is not None
            result = _train_watched(assignment, model, started, is_over, begin)
            if result is None:
                assert chosen is not None
                display.say(f"{chosen.name} is done, for the run in {out}")
                return None
            world.first(lambda: write_json(out / "result.json", result))
            checkpoints.end(world)
    return result


def _check_start(job: Job, out: Path, world: Team) -> None:
    """Check what may stop a run before its dry step; the folder is not changed. Collective.

    Raises:
        UserError: on all ranks, what is in the folder was trained on other data, or a library that
            shows the run's curves is not installed.
    """
    world.first(lambda: check_data(job, out))
    world.agree(lambda: check_tensorboard(job.recipe))
    world.agree(lambda: check_tracker(job.recipe))


def _take_over(
    assignment: Assignment, model: nn.Module, phase_1_of: Path | None, facts: dict[str, Any]
) -> None:
    """Claim the run's folder, with the phase 1 of another run if one is given; collective.

    Raises:
        UserError: on all ranks, the folder, or the other run, does not fit.
    """
    job, out, chosen = assignment.job, assignment.out, assignment.chosen
    world = assignment.ranks.world
    if line := world.first(lambda: take_over(job.recipe, out, chosen)):
        assignment.display.say(line)
    if phase_1_of:
        adopt_large_batch(phase_1_of, job, model, assignment.checkpoints, world)
    world.first(lambda: claim(job.recipe, out, chosen, facts))


def _extension(before: Recipe, assignment: Assignment, facts: dict[str, Any]) -> Callable[[], None]:
    """Check that a complete run can be extended, and return what extends its folder; collective.

    Whatever may refuse the longer run comes between the two: a refused start changes nothing.

    Raises:
        UserError: on all ranks, the run cannot be extended.
        RunError: on all ranks, a save cannot be read.
    """
    job, out, world = assignment.job, assignment.out, assignment.ranks.world
    saves = world.first(lambda: saves_to_extend(before, job, out)) or {}

    def begin() -> None:
        world.first(lambda: extend(saves, before, job.recipe, out))
        world.first(lambda: claim(job.recipe, out, assignment.chosen, facts))

    return begin


def _nothing() -> None:
    """Begin a run whose folder is ready."""


def _train_watched(
    assignment: Assignment,
    model: nn.Module,
    started: float,
    phase_1_is_over: bool,
    begin: Callable[[], None],
) -> dict[str, Any] | None:
    """Train from where the run's saves are, while the watchdog looks for ranks that hang.

    Args:
        assignment: the job's share of the run.
        model: as training begins.
        started: `perf_counter()` when the process began.
        phase_1_is_over: nothing of phase 1 will be trained.
        begin: the last act before training, once nothing else can refuse the run; collective.

    Returns:
        What `result.json` holds, on the first rank, and nothing on the others; None where this
        job's part does not complete the run.
    """
    job, ranks, out, chosen = assignment.job, assignment.ranks, assignment.out, assignment.chosen
    checkpoints, display = assignment.checkpoints, assignment.display
    minutes = job.recipe.watchdog.minutes
    end_stalls(minutes * 60)
    tell_launcher("training")
    with (
        display.running(),
        watching(job.control, minutes, checkpoints.folder, ranks),
        noting_divergence(out, chosen),
    ):
        job.control.heartbeat("the dry step before training")
        model, warnings = _dry_step(model, job, ranks, chosen, phase_1_is_over)
        for line in warnings:
            display.say(line)
        averages = saved_averages(checkpoints, ranks.world)
        begin()
        recorder = recorder_of(assignment, started, averages)
        return train_and_record(model, assignment, resume(assignment, recorder), recorder)


def _complete(recipe: Recipe, out: Path, world: Team, display: Display) -> dict[str, Any] | None:
    """Return what a complete run in `out` ended with; collective.

    Returns:
        The result on the first rank, nothing on the others; None where there is no complete run.

    Raises:
        UserError: on all ranks, the folder holds another recipe's run.
    """
    result = world.first(lambda: finished(recipe, out))
    if not world.any(bool(result)):
        return None
    display.say(f"{out} holds this run, complete: nothing to do")
    return result or {}


def _remove_leftovers(out: Path, world: Team) -> None:
    """Remove what a killed job left in a complete run's folder: saves, and its name; collective.

    Where another job may own the folder, or it cannot be written, they stay.
    """
    if world.broadcast(world.first(lambda: bool(leftovers(out)) or is_owned(out))):
        with suppress(UserError), owning(out, None, world, rhythm=AT_ONCE):
            world.first(lambda: remove_files(leftovers(out)))


def _is_to_extend(before: Recipe | None, recipe: Recipe, out: Path, world: Team) -> bool:
    """Tell whether `out` holds the complete run that this one extends; collective.

    Raises:
        UserError: on all ranks, this run extends another one than `out` holds.
    """
    if before is None:
        return False
    return not world.broadcast(world.first(partial(is_extended, before, recipe, out)))


def _ranks(world: Team, recipe: Recipe, chosen: Part | None) -> AbstractContextManager[Ranks]:
    """Return the grid of a job: one row where it does only one part of phases 1 and 2."""
    if chosen == PHASE_1:
        return single_row(world, ())
    if chosen is not None and chosen.group is not None:
        return single_row(world, (chosen.group,))
    return grid(world, recipe.groups)


def _dry_step(
    model: nn.Module, job: Job, ranks: Ranks, chosen: Part | None, phase_1_is_over: bool
) -> tuple[nn.Module, list[str]]:
    """Try the first step that this job may have to train, on all ranks.

    Returns:
        A model like `model`, and warnings.

    Raises:
        UserError: on all ranks, the step cannot be trained.
    """
    recipe = job.recipe
    if does(chosen, Phase.LARGE_BATCH) and recipe.large_batch.epochs and not phase_1_is_over:
        part, team = PHASE_1, ranks.world
    elif does(chosen, Phase.REFINE) and recipe.refine.epochs:
        part, team = refinement_of(ranks.groups[0]), ranks.group
    else:
        return model, []
    key = Key.of(recipe.seed, part)
    return ranks.world.agree(lambda: dry_step(model, job, job.settings(part), key, team))
