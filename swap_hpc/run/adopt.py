"""A run that begins with another run's phase 1."""

import json
from pathlib import Path

from torch import nn

from swap_hpc.average.state import split_state
from swap_hpc.data.identity import Identity
from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import differing_fields, load_recipe
from swap_hpc.recipe.phase import PHASE_1
from swap_hpc.run.checkpoint import Checkpoints
from swap_hpc.run.folder import load_result
from swap_hpc.run.journal import Line
from swap_hpc.run.weights import Unreadable, read_tensors
from swap_hpc.train.events import Position, SavePoint
from swap_hpc.train.job import Job

# Fields, and sections, of which phase 1 does not know.
AFTER_PHASE_1 = ("name", "groups", "refine.", "batchnorm.", "evaluate.")


def adopt_large_batch(
    run: Path, job: Job, model: nn.Module, checkpoints: Checkpoints, world: Team
) -> None:
    """Saves the end of phase 1 of the complete run in the folder `run` as this run's own, with its metrics and seconds.

    Does nothing where this run has saved of phase 1 already. Raises UserError, on all ranks, where that run is not complete, or
    its phase 1 was another, or trained on other data: of the recipe, what does not concern phase 1 may differ.
    """
    if world.any(checkpoints.holds(PHASE_1)):
        return
    state, lines, ranks, seconds = world.agree(lambda: _read(run, job))
    weights, buffers = split_state(state, model)
    point = SavePoint(
        part=PHASE_1,
        at=Position(len(lines), 0),
        ended=True,
        due=True,
        weights=weights,
        buffers=buffers,
        training={},  # the part is over: nothing of it is trained again
    )
    checkpoints.save(
        point,
        {"ranks": ranks, "lines": lines, "seconds": {"large_batch": seconds, "total": seconds}},
        world,
    )


def _read(run: Path, job: Job):  # type: ignore[no-untyped-def]
    """The state dict, metrics, ranks and seconds of a run's phase 1."""
    result, recipe = load_result(run), job.recipe
    differing = [
        name
        for name in differing_fields(recipe, load_recipe(str(run / "recipe.toml")))
        if not name.startswith(AFTER_PHASE_1)
    ]
    if differing:
        raise UserError(f"--from {run}: its phase 1 was another ({', '.join(differing)} differ)")
    if not recipe.large_batch.epochs:
        raise UserError(
            f"--from {run}, but large_batch.epochs = 0: to refine any model, name its file in model.weights"
        )
    try:
        state, header = read_tensors(run / "large_batch.safetensors")
        lines: list[Line] = [
            json.loads(line)
            for line in (run / "metrics" / "world.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    except (Unreadable, OSError) as why:
        raise UserError(f"--from {run}: its phase 1 cannot be read: {why}") from None
    if "data" in header and (
        how := Identity.from_json(header["data"]).differ(job.identity, ["train"])
    ):
        raise UserError(
            f"--from {run}: its phase 1 was trained on other data ({how}): give it the same data"
        )
    return (
        state,
        [line for line in lines if line["phase"] == "large_batch"],
        result["ranks"],
        result["seconds"]["large_batch"],
    )
