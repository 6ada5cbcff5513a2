"""Averages and evaluations of the weights that a run has saved, without training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from swap_hpc.average.agreement import check_equal
from swap_hpc.average.uniform import WeightSum, average_weights_
from swap_hpc.data.dataset import SplitName
from swap_hpc.data.identity import Identity
from swap_hpc.errors import UserError
from swap_hpc.parallel.grid import node_of
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import load_recipe, recipe_of
from swap_hpc.recipe.phase import refinement_of
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run.checkpoint import sum_of
from swap_hpc.run.fitting import load_foreign_
from swap_hpc.run.predictions import evaluate_and_write
from swap_hpc.run.prepare import prepare
from swap_hpc.run.state_dicts import read_state_dict
from swap_hpc.run.weights import (
    Tensors,
    Unreadable,
    load_weights_,
    read_header,
    read_tensors,
    save_model,
)
from swap_hpc.train.evaluation import evaluate_for_report, evaluate_job
from swap_hpc.train.events import Evaluation
from swap_hpc.train.job import Job
from swap_hpc.train.models import fill_


class Result(NamedTuple):
    """A model that was averaged or evaluated."""

    file: Path
    found: Mapping[SplitName, Evaluation]  # by split
    weights_sha256: str
    notes: tuple[str, ...] = ()  # what a person should know about the data
    members: tuple[int, ...] | None = None  # the groups that were averaged

    @property
    def test(self) -> Evaluation:
        return self.found["test"]


def average(run: Path, groups: Sequence[int] | None, data: Path | None, world: Team) -> Result:
    """Average the weights that groups of a run ended with, and refresh batch norm.

    The average of all groups is the model that `train` ends with. Any number of ranks can do it.

    Args:
        run: the run's folder; the model is written into it.
        groups: the groups to average; None: all.
        data: where the data are; None: where the recipe says.
        world: all ranks.

    Raises:
        UserError: on all ranks, the folder is no run's, the run does not have such a group, or the
            refinement of one has not ended.
    """
    job, model, chosen = prepare_average(run, groups, data, world)
    recipe, mine = job.recipe, chosen[world.rank :: world.size]
    total = world.agree(lambda: sum_of_groups(mine, run, recipe, model))
    average_weights_(model, world, total)
    job.refresh_batchnorm_(model, world)
    digest = check_equal(model, world)
    name = "average" if len(chosen) == recipe.groups else "average-" + "-".join(map(str, chosen))
    file = run / f"{name}.safetensors"
    save_model(model, file, job.header, world)
    found = evaluate_for_report(model, job, world)
    return Result(file, found, digest, job.dataset.notes, tuple(chosen))


def prepare_average(
    run: Path, groups: Sequence[int] | None, data: Path | None, world: Team
) -> tuple[Job, nn.Module, list[int]]:
    """Return a run's job and model, and the groups to average; see `average`."""
    recipe = world.agree(lambda: recipe_in(run, data))
    chosen = world.agree(lambda: _chosen(run, recipe, groups))
    job, model = prepare_saved(recipe, world)
    world.agree(lambda: _check_data(_file(run, chosen[0]), job))
    return job, model, chosen


def evaluate(
    file: Path,
    data: Path | None,
    world: Team,
    split: SplitName = "test",
    overrides: Sequence[str] = (),
    recipe: str | None = None,
    predictions: Path | None = None,
) -> Result:
    """Evaluate the model in any file of weights that a run leaves, or in one of another program.

    In a checkpoint it is the model as it stands, with the mean of batch-norm statistics that differ
    between ranks. In a group's sum over cycles it is their average, its batch norm refreshed.

    Args:
        file: the file; see `read_state_dict` for what it may be.
        data: where the data are; None: where the recipe says.
        world: all ranks.
        split: the samples.
        overrides: fields of the recipe to set, as in "evaluate.batch_size=100".
        recipe: name or file of the recipe that describes the model and the data, for weights of
            another program. None: the recipe in the file, or in the run's folder it lies in.
        predictions: a CSV file to write; see `evaluate_and_write`.

    Raises:
        UserError: on all ranks, the file cannot be read, the model was trained on other classes, or
            there is no such split.
    """
    parsed = world.agree(lambda: _named_recipe(recipe, file, overrides, data) if recipe else None)
    entry = parsed.model.weights_entry if parsed else None
    tensors, header, read_notes = world.agree(lambda: read_state_dict(file, entry))
    described = parsed or world.agree(lambda: _recipe_beside(file, header, data, overrides))
    job, model = prepare_saved(described, world)
    world.agree(lambda: _check_split(split, header, job))
    notes = world.agree(lambda: _checked_classes(file, header, job, split))
    if "count" in header:
        average_weights_(model, Team.alone(), sum_of(tensors, int(header["count"])))
        job.refresh_batchnorm_(model, world)
    elif parsed:
        left_out = parsed.model.weights_except
        notes += tuple(world.agree(lambda: load_foreign_(model, tensors, str(file), left_out)))
    else:
        world.agree(lambda: fill_(model, tensors, str(file)))
    if predictions:
        result = evaluate_and_write(model, job, world, split, predictions)
    else:
        result = evaluate_job(model, job, world, split)
    digest = check_equal(model, world)
    return Result(file, {split: result}, digest, (*read_notes, *job.dataset.notes, *notes))


def _check_split(split: SplitName, header: Mapping[str, str], job: Job) -> None:
    """Raise UserError, with a hint that misleads nobody, where the data have no such split."""
    if split in job.dataset.splits:
        return
    trained_on = Identity.from_json(header["data"]) if "data" in header else None
    if trained_on is None:
        hint = "the data have no validation split: --set data.validation=N sets training samples"
        raise UserError(f"--split validation: {hint} aside")
    if trained_on.validation is None:
        raise UserError(
            "--split validation: the run had no validation split, and was trained on all samples "
            "but those of the test split"
        )
    hint = "--data DIR with those of the run"
    if set_aside := recipe_of(header["recipe"], "the file").data.validation:
        hint = f"--set data.validation={set_aside} sets the same samples aside"
    raise UserError(
        f"--split validation: the data have no validation split, the run had one: {hint}"
    )


def _file(run: Path, group: int, what: str = "") -> Path:
    return run / f"{refinement_of(group).name}{what}.safetensors"


def _named_recipe(name: str, file: Path, overrides: Sequence[str], data: Path | None) -> Recipe:
    """Return a recipe that is about the weights in a file.

    The fields of `model` that say what a run begins with are about another file in the recipe. They
    count where they are set here: `weights_entry` and `weights_except` are then about this file.
    """
    unset = ["model.weights_entry=", "model.weights_except="]
    about_file = [each for each in overrides if each.strip().startswith("model.weights")]
    others = [each for each in overrides if each not in about_file]
    plain = load_recipe(name, [*unset, *others], data)
    if not about_file:
        return plain
    if plain.model.has_library_weights:
        unset.append("model.pretrained=")
    return load_recipe(name, [*unset, *others, *about_file, f"model.weights={_toml(file)}"], data)


def _toml(file: Path) -> str:
    return json.dumps(str(file), ensure_ascii=False)


def _recipe_beside(
    file: Path, header: dict[str, str], data: Path | None, overrides: Sequence[str]
) -> Recipe:
    """Return the recipe in a file, or in the run's folder that the file lies in."""
    if "recipe" in header:
        return recipe_of(header["recipe"], str(file), data, overrides)
    beside = file.parent / "recipe.toml"
    if not beside.is_file():
        raise UserError(
            f"{file} is of another program, and no run lies beside it: "
            "--recipe RECIPE names the model and the data"
        )
    return load_recipe(str(beside), overrides, data)


def _check_data(file: Path, job: Job) -> None:
    """Raise UserError where a file was not trained on the data at hand."""
    header = read_header(file)
    if "data" not in header:
        return
    if how := Identity.from_json(header["data"]).differ(job.identity, ["train"]):
        raise _other_data(file, how)


def _checked_classes(
    file: Path, header: dict[str, str], job: Job, split: SplitName
) -> tuple[str, ...]:
    """Return a note where a split's samples are others. Raise UserError where the classes are."""
    if "data" not in header:
        return ()
    trained_on = Identity.from_json(header["data"])
    if how := trained_on.classes_differ(job.identity):
        raise _other_data(file, how)
    how = trained_on.differ(job.identity, [split])
    if not how:
        return ()
    noun = "training" if split == "train" else split
    note = f"note: not the {noun} samples of the run ({how})"
    trained = _trained_on(trained_on, job.identity) if split == "validation" else 0
    return (f"{note}: it was trained on {trained:,} of them" if trained else note,)


def _trained_on(then: Identity, now: Identity) -> int:
    """Return the number of today's validation samples that a run was trained on.

    The samples that `data.validation` sets aside are the first of one order, which depends on the
    number of all that are not for the test. 0 where that number is another, and nothing is known.
    """
    aside_then, aside_now = (
        each.validation.samples if each.validation else 0 for each in (then, now)
    )
    same_data = then.train.samples + aside_then == now.train.samples + aside_now
    return max(0, aside_now - aside_then) if same_data else 0


def _other_data(file: Path, how: str) -> UserError:
    return UserError(f"{file} was trained on other data ({how}): --data DIR with those of the run")


def _read(file: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        return read_tensors(file)
    except Unreadable as why:
        raise UserError(f"cannot read {file}: {why}") from None


def recipe_in(run: Path, data: Path | None) -> Recipe:
    """Return the recipe in a run's folder. Raise UserError where there is none."""
    file = run / "recipe.toml"
    if not file.is_file():
        raise UserError(f"{run} is not a run's folder: there is no recipe.toml in it")
    return load_recipe(str(file), data=data)


def prepare_saved(recipe: Recipe, world: Team) -> tuple[Job, nn.Module]:
    """Return a job, and its model, whose weights are still to be filled in."""
    with node_of(world) as node:
        return prepare(recipe, world, node)


def _chosen(run: Path, recipe: Recipe, groups: Sequence[int] | None) -> list[int]:
    """Return the groups to average, in order. Raise UserError where one is not there."""
    if recipe.refine.epochs == 0:
        raise UserError(f"{run} holds a run without refinement: there is nothing to average")
    everyone = range(recipe.groups)
    chosen = sorted(set(everyone if groups is None else groups))
    if any(group not in everyone for group in chosen):
        asked = ",".join(map(str, chosen))
        raise UserError(f"--groups {asked}: the run has groups 0 to {recipe.groups - 1}")
    ended = [group for group in everyone if _file(run, group).is_file()]
    missing = [group for group in chosen if group not in ended]
    if missing:
        names = ", ".join(map(str, missing))
        there = ",".join(map(str, ended))
        hint = f"--groups {there} averages those that have" if ended else "start train again"
        raise UserError(
            f"{run}: no weights of group {names}, whose refinement has not ended: {hint}"
        )
    return chosen


def sum_of_groups(groups: Sequence[int], run: Path, recipe: Recipe, model: nn.Module) -> WeightSum:
    """Return what groups contribute to the average: the weights at the ends of all their cycles.

    `model` is changed.
    """
    total = WeightSum()
    for group in groups:
        if recipe.refine.cycles > 1:
            tensors, header = _read(_file(run, group, "-cycles"))
            total.merge_(sum_of(tensors, int(header["count"])))
        else:
            load_weights_(model, _file(run, group))
            total.add_(model)
    return total
