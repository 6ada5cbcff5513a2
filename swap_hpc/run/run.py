"""One run: builds everything from a recipe, claims the run's folder, goes on where it stopped."""

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from swap_hpc.data import Arrays
from swap_hpc.data.identity import Identity
from swap_hpc.data.sampling import Key, Phase
from swap_hpc.errors import Diverged, RunError, UserError
from swap_hpc.parallel.atomic import write_json, write_text
from swap_hpc.parallel.gradients import end_stalls
from swap_hpc.parallel.grid import Ranks, grid, node_of, single_row
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import differing_fields, load_recipe
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run.adopt import adopt_large_batch
from swap_hpc.run.board import check_tensorboard
from swap_hpc.run.checkpoint import Checkpoints
from swap_hpc.run.consumer import Consumer
from swap_hpc.run.display import Display
from swap_hpc.run.dry_step import dry_step
from swap_hpc.run.ending import tell_launcher
from swap_hpc.run.environment import environment
from swap_hpc.run.lock import owning
from swap_hpc.run.part import WHOLE, Part
from swap_hpc.run.prepare import prepare
from swap_hpc.run.watchdog import watching
from swap_hpc.run.weights import read_header
from swap_hpc.train.control import Control
from swap_hpc.train.events import part_name
from swap_hpc.train.job import Job


def train(
    recipe: Recipe,
    out: Path,
    world: Team,
    console: Console,
    control: Control,
    started: float,
    part: Part = WHOLE,
    phase_1_of: Path | None = None,
) -> dict[str, Any] | None:
    """Runs `recipe`, or a part of it, on the ranks of `world` into the folder `out`.

    Returns what `result.json` holds; None where the run is not complete with this part. `recipe` has passed `check_ranks`.
    Goes on where a run in `out` was stopped; leaves a complete one as it is. `control.stop` ends it at the next step
    boundary. `phase_1_of`: a complete run's folder, whose phase 1 is this one's. `started`: `perf_counter()` when the
    process began. Raises UserError, before any training, for all that is wrong with the input; RunError where the run
    fails; Stopped.
    """
    with node_of(world) as node, _ranks(world, recipe, part) as ranks:
        display = Display(recipe, ranks, console)
        if result := _complete(recipe, out, world, display):
            return result
        job, model = prepare(recipe, world, node)
        with owning(out, part, world):
            if result := _complete(
                recipe, out, world, display
            ):  # by the job that had the folder until now
                return result
            world.first(lambda: _check_data(job, out))
            checkpoints = Checkpoints(out / "checkpoints", recipe, job.header["data"])
            if phase_1_of:
                adopt_large_batch(phase_1_of, job, model, checkpoints, world)
            world.agree(lambda: check_tensorboard(recipe))
            world.first(lambda: _claim(recipe, out, part))
            facts = environment(world, node, job.device) | {
                "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                "data": _facts(job),
            }
            world.first(lambda: write_json(out / _environment_name(part), facts))
            for line in _introduction(job, ranks, out):
                display.say(line)
            end_stalls(recipe.watchdog.minutes * 60)
            tell_launcher("training")
            over = phase_1_of is not None or bool(
                world.broadcast(world.first(lambda: (out / "large_batch.safetensors").is_file()))
            )
            with (
                display.running(),
                watching(control, recipe.watchdog.minutes, checkpoints.folder, ranks),
                noting_divergence(out, part),
            ):
                control.beat("the dry step before training")
                model, warnings = _dry_step(model, job, ranks, part, over)
                for line in warnings:
                    display.say(line)
                result = Consumer(
                    job, ranks, out, checkpoints, display, control, started, part
                ).consume(model)
            if result is None:
                display.say(f"{part_name(part.group)} is done, for the run in {out}")
                return None
            world.first(lambda: write_json(out / "result.json", result))
            checkpoints.remove(world)
    return result


def _complete(recipe: Recipe, out: Path, world: Team, display: Display) -> dict[str, Any] | None:
    """What a complete run in `out` ended with, None where there is none. Raises UserError where `out` is another recipe's."""
    finished = world.broadcast(world.agree(lambda: _finished(recipe, out)))
    if finished:
        Checkpoints(out / "checkpoints", recipe).remove(world)
        display.say(f"{out} holds this run, complete: nothing to do")
    return finished


def _dry_step(
    model: nn.Module, job: Job, ranks: Ranks, part: Part, phase_1_is_over: bool
) -> tuple[nn.Module, list[str]]:
    """Tries the first step that this job may have to train, on all ranks. Returns a model like `model`, and warnings.

    Raises UserError on all ranks.
    """
    recipe = job.recipe
    if recipe.large_batch.epochs and part.phase in (None, "large_batch") and not phase_1_is_over:
        key = Key(recipe.seed, Phase.LARGE_BATCH)
        return ranks.world.agree(lambda: dry_step(model, job, recipe.large_batch, key, ranks.world))
    if recipe.refine.epochs and part.phase in (None, "refine"):
        key = Key(recipe.seed, Phase.REFINE, ranks.groups[0])
        return ranks.world.agree(lambda: dry_step(model, job, recipe.refine, key, ranks.group))
    return model, []


@contextmanager
def noting_divergence(out: Path, part: Part) -> Iterator[None]:
    """Leaves `diverged.json` where training ends at a loss or a weight that is not finite; each rank that sees it writes the same."""
    file = out / Diverged.FILE
    if part.phase != "refine":  # else another group's job may have left it
        file.unlink(missing_ok=True)
    try:
        yield
    except Diverged as error:
        why = json.dumps({"why": str(error)}) + "\n"
        with suppress(RunError):
            write_text(file, why)
        raise


def _finished(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """What `result.json` in `out` holds, None where there is none. Raises UserError where `out` holds another recipe's run."""
    if not (out.is_dir() or not out.exists()):
        raise UserError(f"--out {out} is a file: name a folder")
    if (out / "recipe.toml").is_file():
        differing = differing_fields(recipe, load_recipe(str(out / "recipe.toml")))
        if differing:
            raise UserError(
                f"{out} holds a run of another recipe ({', '.join(differing)} differ): choose another --out, or remove the folder"
            )
    try:
        return json.loads((out / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


TRAINED = ("checkpoints/*", "large_batch", "group-*")  # in a run's folder: what it goes on from


def _check_data(job: Job, out: Path) -> None:
    """Raises UserError where `out` holds weights that were trained on other data than those at hand."""
    for file in sorted(each for pattern in TRAINED for each in out.glob(f"{pattern}.safetensors")):
        header = read_header(file)
        if "data" in header and (how := Identity.from_json(header["data"]).differ(job.identity)):
            raise UserError(
                f"{file} was saved with other data ({how}): give back those that the run began with, or choose another --out"
            )


def _ranks(world: Team, recipe: Recipe, part: Part) -> AbstractContextManager[Ranks]:
    if part.phase == "large_batch":
        return single_row(world, ())
    return grid(world, recipe.groups) if part.group is None else single_row(world, (part.group,))


def _facts(job: Job) -> dict[str, Any]:
    """What one has to know of the training images to use the model: the classes' names, and the channels' mean and deviation."""
    dataset = job.dataset
    return {
        "classes": dataset.classes,
        "mean": dataset.mean,
        "std": dataset.std,
        "image_size": dataset.image_size,
    }


def _environment_name(part: Part) -> str:
    """Of the file; that of the whole run, and of phase 1, is environment.json."""
    other = part_name(part.group) if part.group is not None else part.phase
    return "environment.json" if other in (None, "large_batch") else f"environment-{other}.json"


def _claim(recipe: Recipe, out: Path, part: Part) -> None:
    """Writes the recipe into the folder, and removes what a killed start was writing. Raises UserError where that cannot be done."""
    text, file = recipe.to_toml(), out / "recipe.toml"
    if not (file.is_file() and file.read_text(encoding="utf-8") == text):
        try:
            write_text(file, text)
        except RunError as error:
            raise UserError(f"{error}: choose another --out") from None
    own = {None: "*", "refine": f"*{part_name(part.group)}*"}.get(part.phase)
    for folder in (
        (out, out / "checkpoints", out / "metrics") if own else ()
    ):  # other jobs may be writing other parts' files
        for path in folder.glob(f".{own}.*.[0-9]*"):
            path.unlink(missing_ok=True)


def _introduction(job: Job, ranks: Ranks, out: Path) -> list[str]:
    recipe, device = job.recipe, job.device
    where = (
        "in memory" if isinstance(job.dataset.train, Arrays) else "read and decoded in every epoch"
    )
    lines = [
        f"{recipe.name}: {ranks.world.size} ranks, {recipe.groups} groups, {device.name}, {device.threads} threads per rank, "
        f"{recipe.precision}; {len(job.dataset.train):,} training and {len(job.dataset.test):,} test images, {where}; into {out}"
    ]
    lines += job.dataset.notes
    if device.is_shared(ranks.world):
        lines.append(
            "ranks share a GPU: gradients go through host memory (in Slurm, --ntasks-per-node as large as --gpus-per-node gives each one)"
        )
    return lines
