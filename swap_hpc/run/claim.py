"""A run's folder, claimed for a job: what it holds already, and what does not belong into it."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from swap_hpc.data.identity import Identity
from swap_hpc.errors import Diverged, RunError, UserError
from swap_hpc.parallel.atomic import remove, write_json, write_text
from swap_hpc.recipe.loading import check_same_recipe, differing_fields, load_recipe
from swap_hpc.recipe.phase import PHASE_1, Part
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run.checkpoint import Checkpoints
from swap_hpc.run.checks import refines_one_group
from swap_hpc.run.folder import WEIGHTS, holds_weights
from swap_hpc.run.own_files import remove_files, remove_if_empty, start_files
from swap_hpc.run.weights import read_header
from swap_hpc.train.job import Job

# The files that a run resumes from. Candidates for the best checkpoint are none.
TRAINED = ("checkpoints/*-*-???????", "large_batch", "group-*")


def finished(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """Return what `result.json` holds, None where there is none.

    Another recipe's start that failed before its first save does not count.

    Raises:
        UserError: the folder holds a run of another recipe, or files of another origin that a run
            would overwrite, or is a file.
    """
    if not (out.is_dir() or not out.exists()):
        raise UserError(f"--out {out} is a file: name a folder")
    file = out / "recipe.toml"
    if file.is_file() and not (_is_ours(out) or _holds(file, recipe.to_toml())):
        raise UserError(
            f"{file} was not written by a run, and this run would overwrite it: "
            "choose another --out, or rename the file"
        )
    if file.is_file() and holds_weights(out):
        check_same_recipe(recipe, load_recipe(str(file)), f"{out} holds a run of", "the folder")
    try:
        return json.loads((out / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _is_ours(out: Path) -> bool:
    """Tell whether a folder holds a mark of a run: its facts, or weights with our header."""
    if any(map(_is_of_a_job, out.glob("environment*.json"))):
        return True
    return any(read_header(file) for pattern in WEIGHTS for file in out.glob(pattern))


def _is_of_a_job(file: Path) -> bool:
    """Tell whether a file holds the facts that a job writes into a run's folder."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and "ranks" in facts


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode(errors="backslashreplace")


def leftovers(out: Path) -> list[Path]:
    """Return the saves in the folder of a complete run that its own recipe does not keep.

    A job that was killed as it completed the run has left them.
    """
    file = out / "recipe.toml"
    if not (file.is_file() and (out / "result.json").is_file()):
        return []
    return Checkpoints(out / "checkpoints", load_recipe(str(file))).surplus()


def check_data(job: Job, out: Path) -> None:
    """Check that the weights in a run's folder were trained on the data at hand.

    Raises:
        UserError: they were trained on other data.
    """
    for file in sorted(each for pattern in TRAINED for each in out.glob(f"{pattern}.safetensors")):
        header = read_header(file)
        if "data" not in header:
            continue
        if how := Identity.from_json(header["data"]).differ(job.identity):
            raise UserError(
                f"{file} was saved with other data ({how}): give back those that the run began "
                "with, or choose another --out"
            )


def take_over(recipe: Recipe, out: Path, chosen: Part | None) -> str:
    """Remove what another recipe's start left in a folder that holds no weights.

    Files of other names stay: a person may have put them there.

    Returns:
        A line that says so; empty where the folder holds this recipe, or weights.

    Raises:
        UserError: the job refines one group: jobs of other groups may be using the folder.
    """
    file = out / "recipe.toml"
    if not file.is_file() or holds_weights(out) or not _is_ours(out):
        return ""
    try:
        differing = differing_fields(recipe, load_recipe(str(file)))
    except UserError:  # of another version
        differing = ["recipe.toml"]
    if not differing:
        return ""
    if refines_one_group(chosen):
        raise UserError(
            f"{out} was begun by another recipe ({', '.join(differing)} differ), whose jobs may be "
            "running: choose another --out, or remove the folder"
        )
    facts = [*filter(_is_of_a_job, out.glob("environment*.json")), out / Diverged.FILE]
    remove_files([*start_files(out), *facts])
    remove_if_empty(out / "tensorboard")
    return (
        f"{out} held a start of another recipe ({', '.join(differing)} differ) that had saved "
        "nothing: this run takes the folder over"
    )


def claim(recipe: Recipe, out: Path, chosen: Part | None, facts: Mapping[str, Any]) -> None:
    """Write a job's facts and the recipe into a run's folder; remove what a killed job half wrote.

    The facts come first: by them a later start knows the recipe as one that a run has written.

    Raises:
        UserError: the folder cannot be written.
    """
    text, file = recipe.to_toml(), out / "recipe.toml"
    try:
        write_json(out / environment_name(chosen), facts)
        if not _holds(file, text):
            write_text(file, text)
    except RunError as error:
        raise UserError(f"{error}: choose another --out") from None
    if chosen is not None and not refines_one_group(chosen):
        return  # other jobs may be writing the files of other parts
    own = "*" if chosen is None else f"*{chosen.name}*"
    for folder in (out, out / "checkpoints", out / "metrics"):
        for path in folder.glob(f".{own}.*.[0-9]*"):
            remove(path)


def environment_name(chosen: Part | None) -> str:
    """Return the name of a job's file of facts; the whole run and phase 1 share one."""
    if chosen in (None, PHASE_1):
        return "environment.json"
    assert chosen is not None
    return f"environment-{chosen.name}.json"


@contextmanager
def noting_divergence(out: Path, chosen: Part | None) -> Iterator[None]:
    """Leave `diverged.json` where training ends because a loss or a weight is not finite.

    Each rank that sees it writes the same.
    """
    file = out / Diverged.FILE
    if not refines_one_group(chosen):  # otherwise another group's job may have left it
        remove(file)
    try:
        yield
    except Diverged as error:
        with suppress(RunError):
            write_text(file, json.dumps({"why": str(error)}) + "\n")
        raise
