"""Reading the folder of a run, complete or not. Imports neither torch nor MPI."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swap_hpc.errors import Diverged, UserError
from swap_hpc.recipe.loading import load_recipe
from swap_hpc.recipe.phase import PHASE_1, refinement_of
from swap_hpc.recipe.schema import Recipe

if TYPE_CHECKING:  # which imports MPI
    from swap_hpc.parallel.teams import Team

Lines = list[dict[str, Any]]  # of a file of metrics

# The files of weights that a run leaves or resumes from, also a damaged one. Candidates for the
# best checkpoint lie beside the saves, and are of no use without one.
WEIGHTS = ("*.safetensors", "checkpoints/*-*-???????.safetensors", "snapshots/*.safetensors")


def holds_weights(run: Path) -> bool:
    """Tell whether a run's folder holds anything that was trained, or a result."""
    is_complete = (run / "result.json").is_file()
    return is_complete or any(file for pattern in WEIGHTS for file in run.glob(pattern))


def phase_1_is_over(run: Path, world: "Team") -> bool:
    """Tell whether the first rank finds the end of phase 1 in a run's folder; collective."""
    end = run / f"{PHASE_1.name}.safetensors"
    return bool(world.broadcast(world.first(end.is_file)))


def load_result(run: Path) -> dict[str, Any]:
    """Return what `result.json` holds.

    Raises:
        UserError: the folder holds no complete run.
    """
    try:
        return json.loads((run / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        begun = (run / "recipe.toml").is_file()
        state = "has not finished yet" if begun else "is not a run's folder"
        raise UserError(f"{run} {state}: there is no result.json in it") from None


def load_run(run: Path) -> dict[str, Any]:
    """Return what `result.json` holds, or as much of it as an incomplete run has.

    An incomplete run has one more key, `state`, which says how far it is, and no seconds.

    Raises:
        UserError: the folder holds no run, or a damaged one.
    """
    if (run / "result.json").is_file() or not (run / "recipe.toml").is_file():
        return load_result(run)
    recipe = load_recipe(str(run / "recipe.toml"))
    world = read_lines(run / "metrics" / "world.jsonl")
    phase_1 = [line for line in world if line["phase"] == "large_batch"]
    evaluations = {line["model"]: line for line in world if line["phase"] == "evaluation"}
    # the groups begin only when phase 1 has been evaluated
    groups = _read_groups(run, recipe) if "large_batch" in evaluations else []
    ends = _ends_of_cycles(groups, recipe.refine.cycles)
    phase_1_end = evaluations.get("large_batch", phase_1[-1] if phase_1 else {})
    averaged = evaluations.get("swap", {})
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "ranks": _ranks(run),
        "groups": recipe.groups,
        "cycles": recipe.refine.cycles,
        "epochs": {
            "large_batch": len(phase_1),
            "refine": recipe.refine.epochs * recipe.refine.cycles,
        },
        **{
            f"{split}_{name}": _by_model(f"{split}_{name}", phase_1_end, ends, averaged)
            | ema_figures(f"{split}_{name}", phase_1[-1] if phase_1 else {}, ends)
            for split in (["validation"] if "validation_loss" in phase_1_end else []) + ["test"]
            for name in (*recipe.metric_names, "loss")
        },
        "seconds": {},
        "state": _state(run, recipe, len(phase_1), groups),
    }


def read_lines(path: Path) -> Lines:
    """Return the lines of a file of metrics; an empty list where there is no file yet.

    Raises:
        UserError: a line is not JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    # a run may be writing the last line at this moment
    whole = [line for line in lines if line.endswith("\n")]
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): a run that is started again rewrites it"
        ) from None


def _read_groups(run: Path, recipe: Recipe) -> list[Lines]:
    names = [refinement_of(group).name for group in range(recipe.groups)]
    return [read_lines(run / "metrics" / f"{name}.jsonl") for name in names]


def _ends_of_cycles(groups: list[Lines], cycles: int) -> Lines:
    """Return the last line of every group and cycle so far, empty for one that has not begun."""
    ends = []
    for lines in groups:
        last = {line["cycle"]: line for line in lines}
        ends += [last.get(cycle, {}) for cycle in range(1, cycles + 1)]
    return ends


def _by_model(
    name: str, phase_1: dict[str, Any], ends: Lines, averaged: dict[str, Any]
) -> dict[str, Any]:
    """Return one figure of all models, None for a model that there is not yet.

    Args:
        name: the figure's key in the metrics.
        phase_1: the evaluation of the model that phase 1 has reached.
        ends: one for each group and cycle.
        averaged: that of the average.
    """
    values = [line.get(name) for line in ends]
    known = [value for value in values if value is not None]
    complete = bool(known) and len(known) == len(values)
    return {
        "large_batch": phase_1.get(name),
        "groups": values if known else [],
        "mean_of_groups": sum(known) / len(known) if complete else None,
        "averaged": averaged.get(name),
    }


def ema_figures(name: str, phase_1: dict[str, Any], ends: Lines) -> dict[str, Any]:
    """Return a figure of the moving averages of the weights, where the recipe asks for them.

    Args:
        name: the figure's field for the models, such as "test_accuracy".
        phase_1: the line of phase 1's last epoch; empty without one.
        ends: the line of the last epoch of each group and cycle; empty before it.

    Returns:
        "large_batch_ema": the figure; "groups_ema": a list in the order of `ends`.
    """
    key = f"ema_{name}"
    found: dict[str, Any] = {"large_batch_ema": phase_1[key]} if key in phase_1 else {}
    if any(key in line for line in ends):
        found["groups_ema"] = [line.get(key) for line in ends]
    return found


def _state(run: Path, recipe: Recipe, epochs: int, groups: list[Lines]) -> str:
    """Return how far an incomplete run is, and why it ended if its loss diverged."""
    state = f"{epochs} of at most {recipe.large_batch.epochs} epochs of phase 1"
    if groups:
        done = ", ".join(str(len(lines)) for lines in groups)
        state = f"epochs of the groups so far: {done}"
    diverged = run / Diverged.FILE
    if diverged.is_file():
        state += f"; {json.loads(diverged.read_text(encoding='utf-8'))['why']}"
    return state


def _ranks(run: Path) -> int | None:
    """Return the number of ranks that the run was started on, where it is recorded."""
    file = run / "environment.json"
    if not file.is_file():
        return None
    return len(json.loads(file.read_text(encoding="utf-8"))["ranks"])
