"""A run's folder, claimed for a job: what it holds already, and what does not belong into it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from swap_hpc.data.identity import Identity
from swap_hpc.errors import Diverged, RunError, UserError
from swap_hpc.parallel.atomic import write_text
from swap_hpc.recipe.loading import check_same_recipe, differing_fields, load_recipe
from swap_hpc.recipe.phase import PHASE_1, Part
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run.checks import refines_one_group
from swap_hpc.run.folder import holds_weights
from swap_hpc.run.weights import read_header
from swap_hpc.train.job import Job

TRAINED = ("checkpoints/*", "large_batch", "group-*")  # the files that a run resumes from


def finished(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """Return what `result.json` holds, None where there is none.

    Another recipe's start that failed before its first save does not count.

    Raises:
        UserError: the folder holds a run of another recipe, or is a file.
    """
    if not (out.is_dir() or not out.exists()):
        raise UserError(f"--out {out} is a file: name a folder")
    if (out / "recipe.toml").is_file() and holds_weights(out):
        other = load_recipe(str(out / "recipe.toml"))
        check_same_recipe(recipe, other, f"{out} holds a run of", "the folder")
    try:
        return json.loads((out / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


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

    Returns:
        A line that says so; empty where the folder holds this recipe, or weights.

    Raises:
        UserError: the job refines one group: jobs of other groups may be using the folder.
    """
    file = out / "recipe.toml"
    if not file.is_file() or holds_weights(out):
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
    for folder in ("checkpoints", "metrics", "tensorboard", "tracking"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for facts in (Diverged.FILE, "environment.json"):
        (out / facts).unlink(missing_ok=True)
    return (
        f"{out} held a start of another recipe ({', '.join(differing)} differ) that had saved "
        "nothing: this run takes the folder over"
    )


def claim(recipe: Recipe, out: Path, chosen: Part | None) -> None:
    """Write the recipe into a run's folder, and remove what a killed job had begun to write.

    Raises:
        UserError: the folder cannot be written.
    """
    text, file = recipe.to_toml(), out / "recipe.toml"
    if not (file.is_file() and file.read_text(encoding="utf-8") == text):
        try:
            write_text(file, text)
        except RunError as error:
            raise UserError(f"{error}: choose another --out") from None
    if chosen is not None and not refines_one_group(chosen):
        return  # other jobs may be writing the files of other parts
    own = "*" if chosen is None else f"*{chosen.name}*"
    for folder in (out, out / "checkpoints", out / "metrics"):
        for path in folder.glob(f".{own}.*.[0-9]*"):
            path.unlink(missing_ok=True)


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
        file.unlink(missing_ok=True)
    try:
        yield
    except Diverged as error:
        with suppress(RunError):
            write_text(file, json.dumps({"why": str(error)}) + "\n")
        raise
