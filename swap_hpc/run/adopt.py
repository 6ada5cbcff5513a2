"""Another run's phase 1, with which a run begins."""

import json
from pathlib import Path
from typing import NamedTuple

from torch import nn

from swap_hpc.average.state import split_state
from swap_hpc.data.identity import Identity
from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import differing_in_phase_1, load_recipe
from swap_hpc.recipe.phase import PHASE_1
from swap_hpc.run.checkpoint import Checkpoints
from swap_hpc.run.folder import load_result
from swap_hpc.run.lines import Line
from swap_hpc.run.weights import Tensors, Unreadable, read_tensors
from swap_hpc.train.events import Position, SavePoint
from swap_hpc.train.job import Job


def adopt_large_batch(
    run: Path, job: Job, model: nn.Module, checkpoints: Checkpoints, world: Team
) -> None:
    """Save the end of another run's phase 1 as this run's own, with its metrics and seconds.

    Nothing happens where this run has saved something of phase 1 already. Collective over `world`.

    Args:
        run: the folder of the other run, which is complete.
        job: of this run.
        model: of this run.
        checkpoints: of this run.
        world: all ranks.

    Raises:
        UserError: on all ranks, the other run is not complete, or its phase 1 was another, or was
            trained on other data. Fields of the recipe that do not concern phase 1 may differ.
    """
    if world.any(checkpoints.holds(PHASE_1)):
        return
    state, average, lines, ranks, seconds = world.agree(lambda: _read(run, job))
    weights, buffers = split_state(state, model)
    average_weights, average_buffers = split_state(average, model)
    point = SavePoint(
        part=PHASE_1,
        at=Position(len(lines), 0),
        ended=True,
        due=True,
        weights=weights,
        buffers=buffers,
        training={},  # the part is over: nothing of it is trained again
        ema_weights=average_weights,
        ema_buffers=average_buffers,
    )
    checkpoints.save(
        point,
        {"ranks": ranks, "lines": lines, "seconds": {"large_batch": seconds, "total": seconds}},
        world,
    )


class _PhaseOne(NamedTuple):
    """The end of another run's phase 1."""

    state: Tensors  # the state dict
    average: Tensors  # that of the moving average; empty without one
    lines: list[Line]  # metrics
    ranks: int
    seconds: float


def _read(run: Path, job: Job) -> _PhaseOne:
    result, recipe = load_result(run), job.recipe
    if differing := differing_in_phase_1(recipe, load_recipe(str(run / "recipe.toml"))):
        raise UserError(f"--from {run}: its phase 1 was another ({', '.join(differing)} differ)")
    if not recipe.large_batch.epochs:
        raise UserError(
            f"--from {run}, but large_batch.epochs = 0: "
            "to refine any model, name its file in model.weights"
        )
    try:
        state, header = read_tensors(run / f"{PHASE_1.name}.safetensors")
        average: Tensors = {}
        if recipe.large_batch.ema is not None:
            average, _ = read_tensors(run / f"{PHASE_1.name}-ema.safetensors")
        metrics = (run / "metrics" / "world.jsonl").read_text(encoding="utf-8")
    except (Unreadable, OSError) as why:
        raise UserError(f"--from {run}: its phase 1 cannot be read: {why}") from None
    saved_with = Identity.from_json(header["data"]) if "data" in header else job.identity
    if how := saved_with.differ(job.identity, ["train"]):
        raise UserError(
            f"--from {run}: its phase 1 was trained on other data ({how}): give it the same data"
        )
    lines = [json.loads(line) for line in metrics.splitlines()]
    return _PhaseOne(
        state,
        average,
        [line for line in lines if line["phase"] == PHASE_1.phase],
        result["ranks"],
        result["seconds"]["large_batch"],
    )
