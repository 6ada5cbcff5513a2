"""What the folder of a run holds, read without torch or MPI."""

import json
from pathlib import Path
from typing import Any

from swap_hpc.errors import Diverged, UserError
from swap_hpc.recipe.loading import load_recipe

Lines = list[dict[str, Any]]  # of a metrics file


def load_result(run: Path) -> dict[str, Any]:
    """What `result.json` of a run's folder holds. Raises UserError where the folder holds no complete run."""
    try:
        return json.loads((run / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        state = (
            "has not finished yet" if (run / "recipe.toml").is_file() else "is not a run's folder"
        )
        raise UserError(f"{run} {state}: there is no result.json in it") from None


def load_run(run: Path) -> dict[str, Any]:
    """What `result.json` holds; of a run that goes on or broke off, as much of it as there is, and its `state`. Raises UserError."""
    if (run / "result.json").is_file() or not (run / "recipe.toml").is_file():
        return load_result(run)
    recipe = load_recipe(str(run / "recipe.toml"))
    world = _lines(run / "metrics" / "world.jsonl")
    first = [line for line in world if line["phase"] == "large_batch"]
    finals = {line["model"]: line for line in world if line["phase"] == "evaluation"}
    ends: list[dict[str, Any]] = []
    state = f"{len(first)} of at most {recipe.large_batch.epochs} epochs of phase 1"
    if "large_batch" in finals:
        groups = [
            _lines(run / "metrics" / f"group-{group:03d}.jsonl") for group in range(recipe.groups)
        ]
        state = "epochs of the groups so far: " + ", ".join(str(len(lines)) for lines in groups)
        cycles = range(1, recipe.refine.cycles + 1)
        ends = [
            next((x for x in reversed(lines) if x["cycle"] == cycle), {})
            for lines in groups
            for cycle in cycles
        ]
    if (run / Diverged.FILE).is_file():
        state += f"; {json.loads((run / Diverged.FILE).read_text(encoding='utf-8'))['why']}"

    def figures(name: str) -> dict[str, Any]:
        values = [line.get(name) for line in ends]
        found = [value for value in values if value is not None]
        return {
            "large_batch": finals.get("large_batch", first[-1] if first else {}).get(name),
            "groups": values if found else [],
            "mean_of_groups": sum(found) / len(found)
            if found and len(found) == len(values)
            else None,
            "averaged": finals.get("swap", {}).get(name),
        }

    facts = run / "environment.json"
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "ranks": len(json.loads(facts.read_text(encoding="utf-8"))["ranks"])
        if facts.is_file()
        else None,
        "groups": recipe.groups,
        "cycles": recipe.refine.cycles,
        "epochs": {
            "large_batch": len(first),
            "refine": recipe.refine.epochs * recipe.refine.cycles,
        },
        "test_accuracy": figures("test_accuracy"),
        "test_loss": figures("test_loss"),
        "seconds": {},
        "state": state,
    }


def _lines(path: Path) -> Lines:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    try:
        return [
            json.loads(line) for line in lines if line.endswith("\n")
        ]  # the last one may be being written
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): a run that goes on writes it anew") from None
