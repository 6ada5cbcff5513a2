"""A complete run, made ready for more epochs or cycles.

The longer run ends like one that had them from its beginning, to the bit. So the rates of the
epochs already trained must be the same under the new recipe.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.atomic import ask_guards, remove, write_text
from swap_hpc.recipe.loading import differing_fields, load_recipe, recipe_of
from swap_hpc.recipe.phase import PHASE_1, Part, Phase, refinement_of
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.training import LargeBatch, Refine
from swap_hpc.run.weights import Tensors, Unreadable, read_tensors, write_tensors
from swap_hpc.train.job import Job

# The fields that may grow or change, by the phase that a run ends with.
FIELDS = {
    Phase.LARGE_BATCH: ("large_batch.epochs", "large_batch.learning_rate"),
    Phase.REFINE: ("refine.epochs", "refine.cycles", "refine.learning_rate"),
}

BEFORE = "-before"  # ends the names of what the shorter run left

# Made of the final model, or of the groups' weights, by other commands than train.
MADE_OF_IT = (
    "average.safetensors",
    "average-*.safetensors",
    "curves.png",
    "landscape.json",
    "landscape.png",
    "report.html",
    "report.md",
    "trajectory.json",
    "trajectory.png",
)


def last_phase(recipe: Recipe) -> Phase:
    """Return the phase that a run's training ends with."""
    return Phase.REFINE if recipe.refine.epochs else Phase.LARGE_BATCH


def check_extension(before: Recipe, after: Recipe) -> None:
    """Check that a run of one recipe can be extended to one of another.

    Raises:
        UserError: the recipes differ in more than the length of the last phase, or a run that had
            that length from its beginning would have trained otherwise.
    """
    phase, differing = last_phase(before), differing_fields(before, after)
    allowed = FIELDS[phase]
    if other := [name for name in differing if name not in allowed]:
        hint = (
            "; a finished phase 1 is refined by --from RUN, into another folder"
            if phase is Phase.LARGE_BATCH
            else "; the refinement would have to begin again"
        )
        raise UserError(
            f"--extend {other[0]}: this run is extended by {', '.join(allowed)} only{hint}"
        )
    one, other_one = _settings(before), _settings(after)
    if other_one.epochs * other_one.cycles <= one.epochs * one.cycles:
        raise UserError(
            f"--extend: {phase} has {one.epochs * one.cycles} epochs already, all cycles together: "
            "give it more"
        )
    if one.epochs != other_one.epochs and max(one.cycles, other_one.cycles) > 1:
        raise UserError(
            f"--extend refine.epochs: a run of {one.cycles} cycles is extended by refine.cycles, "
            "and one of a single cycle by refine.epochs alone"
        )
    if one.average_every_steps:
        raise UserError(
            "--extend: groups that continue from their average (refine.average_every_steps) are "
            "saved before their last average: such a run cannot be extended"
        )
    if one.stop_accuracy is not None:
        raise UserError(
            "--extend: large_batch.stop_accuracy ends phase 1, not its epochs: "
            "such a run cannot be extended"
        )


def check_rates(before: Recipe, after: Recipe, steps: int) -> None:
    """Check that the epochs already trained have the same learning rates under both recipes.

    Args:
        before: of the run.
        after: of the longer run.
        steps: per epoch.

    Raises:
        UserError: the rate of a step differs, or nothing is learned in the epochs that are added.
    """
    one, other = _settings(before), _settings(after)
    name = last_phase(before).value
    hint = f"give --extend '{name}.learning_rate=...' knots that begin like the old ones"
    for epoch in range(one.epochs):
        for step in range(steps):
            at = epoch + step / steps
            if one.rate(at) != other.rate(at):
                raise UserError(
                    f"--extend: the learning rate of epoch {epoch + 1}, which is trained already, "
                    f"was {one.rate(at):.4g} and would be {other.rate(at):.4g}: only a schedule "
                    f"that keeps its beginning can be extended; {hint}"
                )
    added = range(one.epochs * steps, other.epochs * steps)
    if added and not any(other.rate(step / steps) for step in added):
        raise UserError(
            f"--extend: the learning rate is 0 in all epochs after epoch {one.epochs}: {hint}"
        )


def saves_to_extend(before: Recipe, job: Job, out: Path) -> dict[Part, Path]:
    """Check that the folder of a complete run can become that of a longer one; change nothing.

    Args:
        before: the run's recipe.
        job: of the longer run.
        out: the run's folder.

    Returns:
        The newest save of each part, from which the longer run goes on; for `extend`.

    Raises:
        UserError: the run cannot be extended.
        RunError: a save cannot be read.
    """
    after = job.recipe
    check_rates(before, after, job.steps(_settings(after)))
    groups = _groups(before)
    parts = [PHASE_1, *groups] if before.large_batch.epochs else groups
    newest = {part: _newest(out, part) for part in parts}
    for part, path in newest.items():
        _check_end(path, before, after, continues=part.phase is last_phase(before))
    return newest


def extend(saves: Mapping[Part, Path], before: Recipe, after: Recipe, out: Path) -> None:
    """Make the folder of a complete run that of a longer one, which continues where it ended.

    Each save becomes one inside the longer run. Then `result.json`, the final model and what was
    made of it get names that end in `-before`, and the weights of the groups are removed, which the
    saves hold, too. It may be interrupted at any place and called again.

    Args:
        saves: what `saves_to_extend` returned.
        before: the run's recipe.
        after: of the longer run.
        out: the run's folder.

    Raises:
        RunError: a save cannot be read or written.
    """
    for part, path in saves.items():
        _rewrite(path, after, continues=part.phase is last_phase(before))
    final = "swap" if before.refine.epochs else PHASE_1.name
    made = [path for name in MADE_OF_IT for path in out.glob(name) if not _is_renamed(path)]
    for path in (out / f"{final}.safetensors", *sorted(made)):
        _rename(path)
    for part in _groups(before):
        for path in out.glob(f"{part.name}*.safetensors"):
            remove(path)
    _rename(out / "result.json")
    write_text(out / "recipe.toml", after.to_toml())


def is_extended(before: Recipe, after: Recipe, out: Path) -> bool:
    """Tell whether a run's folder holds the longer run already, complete or not.

    Raises:
        UserError: it holds neither, or a run that has not finished yet.
    """
    file = out / "recipe.toml"
    if not file.is_file():
        raise UserError(f"--extend: {out} holds no run")
    there = load_recipe(str(file))
    if not differing_fields(there, after):
        return True
    if differing := differing_fields(there, before):
        raise UserError(
            f"--extend: {out} holds a run of another recipe ({', '.join(differing)} differ): name "
            "the recipe and the --set that it was started with"
        )
    is_complete = any((out / f"result{what}.json").is_file() for what in ("", "-before"))
    if not is_complete:
        raise UserError(f"--extend: the run in {out} has not finished: start it without --extend")
    return False


def _groups(recipe: Recipe) -> list[Part]:
    """Return the parts that refine; none in a run without refinement."""
    return [refinement_of(group) for group in range(recipe.groups)] if recipe.refine.epochs else []


def _settings(recipe: Recipe) -> LargeBatch | Refine:
    return recipe.refine if recipe.refine.epochs else recipe.large_batch


def _newest(out: Path, part: Part) -> Path:
    files = sorted((out / "checkpoints").glob(f"{part.name}-?????-???????.safetensors"))
    if not files:
        raise UserError(
            f"--extend: {out}/checkpoints holds no save of {part.name}: a run keeps them at its "
            "end with checkpoint.keep = true"
        )
    return files[-1]


def _read(path: Path) -> tuple[Tensors, dict[str, str]]:
    try:
        return read_tensors(path)
    except Unreadable as why:
        raise RunError(f"--extend: {path} is {why}") from None


def _check_end(path: Path, before: Recipe, after: Recipe, continues: bool) -> None:
    """Check that a save is the end of a part of the run, or one of the longer run already."""
    _, header = _read(path)
    if "recipe" not in header:
        raise RunError(f"--extend: {path} is damaged: it has no checksum")
    saved_by, state = recipe_of(header["recipe"], str(path)), json.loads(header["state"])
    if not differing_fields(saved_by, after):
        return
    if differing_fields(saved_by, before):
        raise UserError(f"--extend: {path} was saved by another recipe than this run's")
    if not state["ended"]:
        raise UserError(
            f"--extend: {path} is not the end of this run: end it first, by the line that began it"
        )
    if continues and not state["training"]["dict"]:
        raise UserError(f"--extend: {path} holds no state of the optimizer, as of a run by --from")


def _rewrite(path: Path, after: Recipe, continues: bool) -> None:
    """Rewrite a save as one of the longer run; one that is that already stays."""
    tensors, header = _read(path)
    if not differing_fields(recipe_of(header["recipe"], str(path)), after):
        return
    state = json.loads(header["state"])
    if continues:
        tensors = _going_on(tensors, state, after)
    kept = {key: value for key, value in header.items() if key not in ("sha256", "format")}
    kept |= {"recipe": after.to_toml(), "state": json.dumps(state)}
    write_tensors(path, tensors, kept)


def _going_on(tensors: Tensors, state: dict[str, Any], after: Recipe) -> Tensors:
    """Return the tensors of a save whose part goes on; `state` is changed, too."""
    state["ended"] = False
    if after.refine.cycles > 1:
        return tensors
    # The longer run is inside its only cycle here, whose end it still has to add.
    state["cycles"] = 0
    return {
        name: tensor for name, tensor in tensors.items() if not name.startswith(("sums/", "kept/"))
    }


def _is_renamed(path: Path) -> bool:
    return path.stem.endswith(BEFORE)


def _rename(path: Path) -> None:
    """Rename a file, if it is there, to what a reader takes for one of the shorter run."""
    if path.is_file():
        ask_guards(path)
        path.replace(path.with_name(f"{path.stem}{BEFORE}{path.suffix}"))
