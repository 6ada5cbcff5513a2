"""Where a run's weights went, from its snapshots: towards the average or not, and how far from each other."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swap_hpc.errors import UserError
from swap_hpc.parallel.atomic import write_json
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1
from swap_hpc.run.folder import load_result
from swap_hpc.run.saved import prepare_saved, recipe_in
from swap_hpc.study import figures
from swap_hpc.study.planes import gradient, seen_as_tests, shared_out, vector_of


def trajectory(
    run: Path, data: Path | None, samples: int, world: Team, tell: Callable[[str], None]
) -> Path:
    """Writes `trajectory.json` and `trajectory.png` into the folder of a run that was made with `checkpoint.snapshots`.

    For each snapshot: the cosine between the negative gradient of the mean loss over up to `samples` training images (not augmented,
    always the same ones; without weight decay) and the direction from there to the average; and the distance to it. For each epoch of the
    refinement: the distances between the groups, pair by pair. The snapshots are shared out to the ranks. Source: section 4 of the SWAP
    paper. Returns the figure's path. Raises UserError, on all ranks, for a run without snapshots, or one that is not complete.
    """
    recipe = world.agree(lambda: recipe_in(run, data))
    snapshots = world.agree(lambda: _snapshots(run))
    job, model = prepare_saved(recipe, world)
    average = world.agree(lambda: vector_of(run / "swap.safetensors", model))
    looked_at = seen_as_tests(job, job.dataset.train, samples)
    found = np.zeros((len(snapshots), 2))
    for number in shared_out(len(snapshots), world):
        weights = vector_of(snapshots[number][2], model)
        descent, direction = (
            -gradient(model, looked_at.test_batches(Team.alone()), job),
            average - weights,
        )
        norms = descent.norm() * direction.norm()
        found[number] = (
            float(descent @ direction / norms) if norms else 0.0,
            float(direction.norm()),
        )
        tell(f"{min(number + world.size, len(snapshots))} of {len(snapshots)} snapshots")
    world.sum_(found)
    content: dict[str, Any] = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "samples": samples,
        "large_batch_epochs": _phase_1(run),
    }
    content["snapshots"] = [
        {"part": part, "epoch": epoch, "cosine": cosine, "distance": distance}
        for (part, epoch, _), (cosine, distance) in zip(snapshots, found.tolist(), strict=True)
    ]
    content["between_groups"] = world.broadcast(
        world.first(lambda: _between_groups(snapshots, model))
    )
    world.first(lambda: write_json(run / "trajectory.json", content))
    world.first(lambda: figures.trajectory(content, run / "trajectory.png"))
    return run / "trajectory.png"


def _snapshots(run: Path) -> list[tuple[str, int, Path]]:
    """Part of the run, epoch of the part, file."""
    files = sorted((run / "snapshots").glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{run} has no snapshots: train with --set checkpoint.snapshots=1 (epochs between them)"
        )
    if not (run / "swap.safetensors").is_file():
        raise UserError(
            f"{run}: no swap.safetensors in it: a trajectory needs a complete run with a refinement"
        )
    return [
        (name, int(epoch), file) for file in files for name, _, epoch in [file.stem.rpartition("-")]
    ]


def _phase_1(run: Path) -> int:
    return int(load_result(run)["epochs"]["large_batch"])


def _between_groups(
    snapshots: list[tuple[str, int, Path]], model: torch.nn.Module
) -> list[dict[str, Any]]:
    refined = [each for each in snapshots if each[0] != PHASE_1.name]
    distances = []
    for epoch in sorted({epoch for _, epoch, _ in refined}):
        there = [(part, vector_of(file, model)) for part, at, file in refined if at == epoch]
        distances += [
            {"epoch": epoch, "groups": [one, other], "distance": float((here - far).norm())}
            for (one, here), (other, far) in combinations(there, 2)
        ]
    return distances
