"""One run: builds everything from a recipe, claims the run's folder, goes on where it stopped."""

import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from swap_hpc.data import Arrays, Batches, Dataset
from swap_hpc.data.normalisation import normalisation_line
from swap_hpc.data.sampling import Key
from swap_hpc.parallel.atomic import write_json
from swap_hpc.parallel.grid import Ranks, grid, node_of, single_row
from swap_hpc.parallel.horovod import end_stalls
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1, Part, Phase, refinement_of
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.wording import count
from swap_hpc.run.adopt import adopt_large_batch
from swap_hpc.run.assignment import Assignment
from swap_hpc.run.best import check_best
from swap_hpc.run.board import check_tensorboard
from swap_hpc.run.checkpoint import Checkpoints
from swap_hpc.run.checks import does
from swap_hpc.run.claim import (
    check_data,
    claim,
    environment_name,
    finished,
    noting_divergence,
    take_over,
)
from swap_hpc.run.display import Display
from swap_hpc.run.dry_step import dry_step
from swap_hpc.run.ending import tell_launcher
from swap_hpc.run.environment import environment
from swap_hpc.run.extend import extend, is_extended
from swap_hpc.run.folder import phase_1_is_over
from swap_hpc.run.idle_fields import idle_fields
from swap_hpc.run.initial import begin_with_weights_
from swap_hpc.run.lock import owning
from swap_hpc.run.loop import train_and_record
from swap_hpc.run.prepare import prepare
from swap_hpc.run.record import recorder_of
from swap_hpc.run.resume import resume, saved_averages
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
        What `result.json` holds; None where this job's part does not complete the run.

    Raises:
        UserError: before any training, the input is wrong.
        RunError: the run failed.
        Stopped: a rank was asked to stop, and all is saved.
    """
    with node_of(world) as node, _ranks(world, recipe, chosen) as ranks:
        display = Display(recipe, ranks, console)
        if not _is_to_extend(extends, recipe, out, world) and (
            result := _complete(recipe, out, world, display)
        ):
            return result
        job, model = prepare(recipe, world, node)
        world.agree(partial(check_best, job))
        job = replace(job, control=control)
        display.noun = job.dataset.noun
        control.save_as(recipe.checkpoint)
        with owning(out, chosen, world):
            # again: a job that had the folder until now may have extended or completed the run
            if extends and _is_to_extend(extends, recipe, out, world):
                world.first(partial(extend, extends, job, out))
            if result := _complete(recipe, out, world, display):
                return result
            checkpoints = Checkpoints(out / "checkpoints", recipe, job.header["data"])
            assignment = Assignment(job, ranks, out, chosen, checkpoints, display)
            notes = idle_fields(recipe, model)
            if phase_1_of is None:
                notes += begin_with_weights_(model, job, out, checkpoints, world)
            _take_over(assignment, model, node, phase_1_of)
            for line in notes:
                display.say(line)
            result = _train_watched(assignment, model, started, phase_1_of is not None)
            if result is None:
                assert chosen is not None
                display.say(f"{chosen.name} is done, for the run in {out}")
                return None
            world.first(lambda: write_json(out / "result.json", result))
            checkpoints.end(world)
    return result


def _take_over(
    assignment: Assignment, model: nn.Module, node: Team, phase_1_of: Path | None
) -> None:
    """Check the run's folder, claim it, write this job's facts and say what begins; collective.

    Raises:
        UserError: on all ranks, what is in the folder does not belong to the run.
    """
    job, out, chosen = assignment.job, assignment.out, assignment.chosen
    world = assignment.ranks.world
    if line := world.first(lambda: take_over(job.recipe, out, chosen)):
        assignment.display.say(line)
    world.first(lambda: check_data(job, out))
    if phase_1_of:
        adopt_large_batch(phase_1_of, job, model, assignment.checkpoints, world)
    world.agree(lambda: check_tensorboard(job.recipe))
    world.agree(lambda: check_tracker(job.recipe))
    world.first(lambda: claim(job.recipe, out, chosen))
    facts = environment(world, node, job.device)
    facts["command"] = [Path(sys.argv[0]).name, *sys.argv[1:]]
    facts["data"] = _facts(job)
    world.first(lambda: write_json(out / environment_name(chosen), facts))
    for line in _introduction(job, assignment.ranks, out):
        assignment.display.say(line)


def _train_watched(
    assignment: Assignment, model: nn.Module, started: float, phase_1_is_adopted: bool
) -> dict[str, Any] | None:
    """Train from where the run's saves are, while the watchdog looks for ranks that hang.

    Returns:
        What `result.json` holds; None where this job's part does not complete the run.
    """
    job, ranks, out, chosen = assignment.job, assignment.ranks, assignment.out, assignment.chosen
    checkpoints, display = assignment.checkpoints, assignment.display
    minutes = job.recipe.watchdog.minutes
    end_stalls(minutes * 60)
    tell_launcher("training")
    is_over = phase_1_is_adopted or phase_1_is_over(out, ranks.world)
    with (
        display.running(),
        watching(job.control, minutes, checkpoints.folder, ranks),
        noting_divergence(out, chosen),
    ):
        job.control.heartbeat("the dry step before training")
        model, warnings = _dry_step(model, job, ranks, chosen, is_over)
        for line in warnings:
            display.say(line)
        averages = saved_averages(checkpoints, ranks.world)
        recorder = recorder_of(assignment, started, averages)
        return train_and_record(model, assignment, resume(assignment, recorder), recorder)


def _complete(recipe: Recipe, out: Path, world: Team, display: Display) -> dict[str, Any] | None:
    """Return what a complete run in `out` ended with, None where there is none; collective.

    Raises:
        UserError: on all ranks, the folder holds another recipe's run.
    """
    result = world.broadcast(world.agree(lambda: finished(recipe, out)))
    if result:
        Checkpoints(out / "checkpoints", recipe).end(world)
        display.say(f"{out} holds this run, complete: nothing to do")
    return result


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


def _facts(job: Job) -> dict[str, Any]:
    """Return what a program needs to know of the training images to use the model."""
    dataset = job.dataset
    return {
        "classes": dataset.classes,
        "mean": dataset.mean,  # of each channel
        "std": dataset.std,  # of each channel
        "image_size": dataset.image_size,
        "samples": {name: len(split) for name, split in dataset.splits.items()},
    }


def _sizes(data: Dataset) -> str:
    """Return the numbers of samples: "1,198 training and 599 test"."""
    words = {"train": "training", "validation": "validation", "test": "test"}
    *parts, last = (f"{len(split):,} {words[name]}" for name, split in data.splits.items())
    return f"{', '.join(parts)} and {last}"


def _introduction(job: Job, ranks: Ranks, out: Path) -> list[str]:
    """Return the lines that a person sees first."""
    recipe, device, data = job.recipe, job.device, job.dataset
    world = ranks.world
    is_in_memory = isinstance(data.train, Arrays)
    where = "in memory" if is_in_memory else "read and decoded in every epoch"
    if isinstance(data.train, Batches):
        where = f"made by {recipe.data.name}"
    lines = [
        f"{recipe.name}: {count(world.size, 'rank')}, {count(recipe.groups, 'group')}, "
        f"{device.name}, {count(device.threads, 'thread')} per rank, {recipe.precision}; "
        f"{_sizes(data)} {data.noun}, {where}; into {out}"
    ]
    lines += data.notes
    lines += normalisation_line(data, recipe.data)
    if device.is_shared(world):
        lines.append(
            "ranks share a GPU: gradients go through host memory "
            "(in Slurm, --ntasks-per-node as large as --gpus-per-node gives each rank one)"
        )
    return lines
