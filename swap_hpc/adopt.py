"""A run that begins with another run's phase 1."""

import json
from pathlib import Path

from torch import nn

from swap_hpc.checkpoint import Checkpoints
from swap_hpc.errors import UserError
from swap_hpc.events import SavePoint
from swap_hpc.figures import load_result
from swap_hpc.files import Unreadable, read_tensors
from swap_hpc.metrics import Line
from swap_hpc.ranks import Team
from swap_hpc.recipe import Recipe, differing_fields, load_recipe

# Fields, and sections, of which phase 1 does not know.
AFTER_PHASE_1 = ("name", "groups", "refine.", "batchnorm.", "evaluate.")


def adopt_large_batch(run: Path, recipe: Recipe, model: nn.Module, checkpoints: Checkpoints, world: Team) -> None:
    """Saves the end of phase 1 of the complete run in the folder `run` as this run's own, with its metrics and seconds.

    Does nothing where this run has saved of phase 1 already. Raises UserError, on all ranks, where that run is not complete, or
    its phase 1 was another: of `recipe`, what does not concern phase 1 may differ.
    """
    if world.any(checkpoints.holds("large_batch")):
        return
    state, lines, ranks, seconds = world.agree(lambda: _read(run, recipe))
    own = {name for name, _ in model.named_buffers()}
    point = SavePoint(
        phase="large_batch",
        group=None,
        epoch=len(lines),
        step=0,
        ended=True,
        due=True,
        weights={name: t for name, t in state.items() if name not in own},
        buffers={name: t for name, t in state.items() if name in own},
        momentum={},
    )
    checkpoints.save(point, {"ranks": ranks, "lines": lines, "seconds": {"large_batch": seconds, "total": seconds}}, world)


def _read(run: Path, recipe: Recipe):  # type: ignore[no-untyped-def]
    """The state dict, metrics, ranks and seconds of a run's phase 1."""
    result = load_result(run)
    differing = [name for name in differing_fields(recipe, load_recipe(str(run / "recipe.toml"))) if not name.startswith(AFTER_PHASE_1)]
    if differing:
        raise UserError(f"--from {run}: its phase 1 was another ({', '.join(differing)} differ)")
    if not recipe.large_batch.epochs:
        raise UserError(f"--from {run}, but large_batch.epochs = 0: to refine any model, name its file in model.weights")
    try:
        state, _ = read_tensors(run / "large_batch.safetensors")
        lines: list[Line] = [json.loads(line) for line in (run / "metrics" / "world.jsonl").read_text().splitlines()]
    except (Unreadable, OSError) as why:
        raise UserError(f"--from {run}: its phase 1 cannot be read: {why}") from None
    return state, [line for line in lines if line["phase"] == "large_batch"], result["ranks"], result["seconds"]["large_batch"]
