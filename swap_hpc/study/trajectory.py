"""Where the weights of a run went: towards the average or not, and how far from each other."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from swap_hpc.errors import UserError
from swap_hpc.parallel.atomic import write_json
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1
from swap_hpc.run.folder import load_result
from swap_hpc.run.saved import prepare_saved, recipe_in
from swap_hpc.study.figures.trajectory import draw_trajectory
from swap_hpc.study.planes import gradient, share_of_rank, vector_of, with_test_samples


@dataclass(frozen=True)
class Snapshot:
    """Weights that a run kept on its way."""

    part: str
    """`large_batch`, `group-003` ..."""
    epoch: int
    """Of the part, from 1."""
    file: Path


def trajectory(
    run: Path, data: Path | None, samples: int, world: Team, show: Callable[[str], None]
) -> Path:
    """Measure the snapshots of a run; write `trajectory.json` and `trajectory.png` into its folder.

    At each snapshot: the cosine between the negative gradient of the mean loss and the direction
    from there to the average, and the distance to the average. At each epoch of the refinement:
    the distances between the groups, pair by pair. The ranks share the snapshots.
    Source: section 4 of the SWAP paper.

    Args:
        run: the folder of a run with `checkpoint.snapshots`.
        data: the folder with the data; None: the recipe's.
        samples: at most so many training images for a gradient, always the same ones. They are
            not augmented, and the gradient is without weight decay.
        world: all ranks.
        show: prints a line about the progress.

    Returns:
        The path of the figure.

    Raises:
        UserError: the run has no snapshots or is not complete; on all ranks.
    """
    recipe = world.agree(lambda: recipe_in(run, data))
    snapshots = world.agree(lambda: _snapshots(run))
    job, model = prepare_saved(recipe, world)
    average = world.agree(lambda: vector_of(run / "swap.safetensors", model))
    measured = with_test_samples(job, job.dataset.train, samples)
    found = np.zeros((len(snapshots), 2))  # cosine, distance
    for number in share_of_rank(len(snapshots), world):
        weights = vector_of(snapshots[number].file, model)
        descent = -gradient(model, measured.test_batches(Team.alone()), job)
        direction = average - weights
        norms = descent.norm() * direction.norm()
        cosine = float(descent @ direction / norms) if norms else 0.0
        found[number] = cosine, float(direction.norm())
        done = min(number + world.size, len(snapshots))
        show(f"{done} of {len(snapshots)} snapshots")
    world.sum_(found)
    content: dict[str, Any] = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "samples": samples,
        "large_batch_epochs": int(load_result(run)["epochs"]["large_batch"]),
        "snapshots": [
            {"part": each.part, "epoch": each.epoch, "cosine": cosine, "distance": distance}
            for each, (cosine, distance) in zip(snapshots, found.tolist(), strict=True)
        ],
    }
    content["between_groups"] = world.broadcast(
        world.first(lambda: _between_groups(snapshots, model))
    )
    world.first(lambda: write_json(run / "trajectory.json", content))
    world.first(lambda: draw_trajectory(content, run / "trajectory.png"))
    return run / "trajectory.png"


def _snapshots(run: Path) -> list[Snapshot]:
    files = sorted((run / "snapshots").glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{run} has no snapshots: train with --set checkpoint.snapshots=1 (epochs between them)"
        )
    if not (run / "swap.safetensors").is_file():
        raise UserError(
            f"{run}: no swap.safetensors in it: a trajectory needs a complete run with a refinement"
        )
    snapshots = []
    for file in files:
        part, _, epoch = file.stem.rpartition("-")
        snapshots.append(Snapshot(part, int(epoch), file))
    return snapshots


def _between_groups(snapshots: list[Snapshot], model: nn.Module) -> list[dict[str, Any]]:
    """Return the distance of every pair of groups at every epoch of the refinement."""
    refined = [each for each in snapshots if each.part != PHASE_1.name]
    distances = []
    for epoch in sorted({each.epoch for each in refined}):
        there = [
            (each.part, vector_of(each.file, model)) for each in refined if each.epoch == epoch
        ]
        for (one, here), (other, far) in combinations(there, 2):
            distance = float((here - far).norm())
            distances.append({"epoch": epoch, "groups": [one, other], "distance": distance})
    return distances
