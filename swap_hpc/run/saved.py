"""What is made of a run's saved weights without training: the average of any of its groups, and evaluations."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from swap_hpc.average.agreement import check_equal
from swap_hpc.average.uniform import WeightSum, average_weights_
from swap_hpc.data.identity import Identity
from swap_hpc.errors import UserError
from swap_hpc.parallel.grid import node_of
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import load_recipe, recipe_of
from swap_hpc.recipe.phase import refinement_of
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run.checkpoint import model_state, sum_of
from swap_hpc.run.prepare import prepare
from swap_hpc.run.weights import (
    Tensors,
    Unreadable,
    load_weights_,
    read_header,
    read_tensors,
    save_model,
)
from swap_hpc.train.evaluation import evaluate_job
from swap_hpc.train.events import Evaluation
from swap_hpc.train.job import Job
from swap_hpc.train.models import fill_


class Result(NamedTuple):
    file: Path
    test: Evaluation
    weights_sha256: str
    notes: tuple[str, ...] = ()  # what a person should know of the data


def average(run: Path, groups: Sequence[int] | None, data: Path | None, world: Team) -> Result:
    """Averages the weights that groups of a run ended with (None: all) and refreshes batch norm, on any number of ranks.

    Writes the model into the run's folder. With all groups it is the one that `train` ends with. Raises UserError, on all
    ranks, for what is no run's folder, and for groups that the run does not have or that did not end.
    """
    recipe = world.agree(lambda: recipe_in(run, data))
    chosen = world.agree(lambda: _chosen(run, recipe, groups))
    job, model = prepare_saved(recipe, world)
    world.agree(lambda: _check_data(run / f"{refinement_of(chosen[0]).name}.safetensors", job))
    total = world.agree(lambda: _sum(chosen[world.rank :: world.size], run, recipe, model))
    average_weights_(model, world, total)
    job.refresh_batchnorm_(model, world)
    digest = check_equal(model, world)
    name = "average" if len(chosen) == recipe.groups else "average-" + "-".join(map(str, chosen))
    file = run / f"{name}.safetensors"
    save_model(model, file, job.header, world)
    return Result(file, evaluate_job(model, job, world), digest, job.dataset.notes)


def evaluate(file: Path, data: Path | None, world: Team) -> Result:
    """The test loss and accuracy of any .safetensors file that a run leaves, on any number of ranks.

    Of a checkpoint, its model as it stands (of batch-norm statistics that differ between ranks, their mean); of a group's sum over
    cycles, their average, batch norm refreshed. Raises UserError, on all ranks, also where the data at hand have other classes
    than those that the model was trained on.
    """
    tensors, header = world.agree(lambda: _read(file))
    recipe = world.agree(
        lambda: (
            recipe_of(header["recipe"], str(file), data)
            if "recipe" in header
            else recipe_in(file.parent, data)
        )
    )
    job, model = prepare_saved(recipe, world)
    notes = world.agree(lambda: _checked_classes(file, header, job))
    if "count" in header:
        average_weights_(model, Team.alone(), sum_of(tensors, int(header["count"])))
        job.refresh_batchnorm_(model, world)
    else:
        state = model_state(tensors, header) if "checkpoint" in header else tensors
        world.agree(lambda: fill_(model, state, str(file)))
    return Result(
        file,
        evaluate_job(model, job, world),
        check_equal(model, world),
        (*job.dataset.notes, *notes),
    )


def _check_data(file: Path, job: Job) -> None:
    """Raises UserError where the data at hand are not those that a run was trained on."""
    header = read_header(file)
    if "data" in header and (
        how := Identity.from_json(header["data"]).differ(job.identity, ["train"])
    ):
        raise UserError(
            f"{file} was trained on other data ({how}): --data DIR with those of the run"
        )


def _checked_classes(file: Path, header: dict[str, str], job: Job) -> tuple[str, ...]:
    """A note where the test samples are others. Raises UserError where the classes are."""
    if "data" not in header:
        return ()
    trained_on = Identity.from_json(header["data"])
    if how := trained_on.classes_differ(job.identity):
        raise UserError(
            f"{file} was trained on other data ({how}): --data DIR with those of the run"
        )
    how = trained_on.differ(job.identity, ["test"])
    return (f"note: not the test samples of the run ({how})",) if how else ()


def _read(file: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        return read_tensors(file)
    except Unreadable as why:
        raise UserError(f"cannot read {file}: {why}") from None


def recipe_in(run: Path, data: Path | None) -> Recipe:
    file = run / "recipe.toml"
    if not file.is_file():
        raise UserError(f"{run} is not a run's folder: there is no recipe.toml in it")
    return load_recipe(str(file), data=data)


def prepare_saved(recipe: Recipe, world: Team) -> tuple[Job, nn.Module]:
    """A job, and its model, whose weights are still to be filled in."""
    with node_of(world) as node:
        return prepare(
            recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": None})}),
            world,
            node,
        )


def _chosen(run: Path, recipe: Recipe, groups: Sequence[int] | None) -> list[int]:
    if recipe.refine.epochs == 0:
        raise UserError(f"{run} holds a run without refinement: there is nothing to average")
    chosen = sorted(set(groups)) if groups is not None else list(range(recipe.groups))
    unknown = [group for group in chosen if not 0 <= group < recipe.groups]
    if unknown:
        raise UserError(
            f"--groups {','.join(map(str, chosen))}: the run has groups 0 to {recipe.groups - 1}"
        )
    ended = [
        group
        for group in range(recipe.groups)
        if (run / f"{refinement_of(group).name}.safetensors").is_file()
    ]
    missing = [group for group in chosen if group not in ended]
    if missing:
        mend = (
            f"--groups {','.join(map(str, ended))} averages those that have"
            if ended
            else "start train again"
        )
        raise UserError(
            f"{run}: no weights of group {', '.join(map(str, missing))}, whose refinement has not ended: {mend}"
        )
    return chosen


def _sum(groups: Sequence[int], run: Path, recipe: Recipe, model: nn.Module) -> WeightSum:
    """What groups contribute to the average: their weights at the ends of all their cycles. Changes `model`."""
    total = WeightSum()
    for group in groups:
        if recipe.refine.cycles > 1:
            tensors, header = _read(run / f"{refinement_of(group).name}-cycles.safetensors")
            total.merge_(sum_of(tensors, int(header["count"])))
        else:
            load_weights_(model, run / f"{refinement_of(group).name}.safetensors")
            total.add_(model)
    return total
