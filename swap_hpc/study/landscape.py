"""Train and test error, or loss, on planes through the weights of a run.

The planes are those of the SWAP paper's figures (section 4), after Garipov et al. 2018.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from swap_hpc.average.batchnorm import refresh_batchnorm_
from swap_hpc.errors import UserError
from swap_hpc.parallel.atomic import write_json
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.metrics import SHARES
from swap_hpc.run.saved import prepare_saved, recipe_in
from swap_hpc.study.figures.landscape import draw_landscape
from swap_hpc.study.planes import (
    Plane,
    fill_parameters_,
    share_of_rank,
    vector_of,
    with_test_samples,
)
from swap_hpc.train.evaluation import evaluate_job
from swap_hpc.train.job import Job

MARGIN = 0.35  # around the models, as a share of the distance that they span

SECONDS_BETWEEN = 5.0  # lines about the progress


@dataclass(frozen=True)
class Models:
    """The models of a plane, by the names of their files."""

    title: str
    names: tuple[str, str, str]
    """The three that it goes through."""
    others: tuple[str, ...] = ()
    """Those that are projected onto it."""


def landscape(
    run: Path,
    data: Path | None,
    points: int,
    samples: int,
    world: Team,
    show: Callable[[str], None],
) -> Path:
    """Evaluate grids of models; write `landscape.json` and `landscape.png` into the run's folder.

    Measured is the error, 1 - accuracy, where the main metric is a share of right answers, else the
    loss.

    One plane goes through the end of phase 1, group 0 and the average. With three groups or more,
    a second one goes through three of them. At each point batch norm is re-estimated on at most
    `samples` augmented training images. The ranks share the points.

    Args:
        run: the folder of a complete run with a refinement.
        data: the folder with the data; None: the recipe's.
        points: models along each side of a grid.
        samples: at most so many training and test images, always the same ones, for an error.
        world: all ranks.
        show: prints a line about the progress.

    Returns:
        The path of the figure.

    Raises:
        UserError: the folder holds no such run; on all ranks.
    """
    recipe = world.agree(lambda: recipe_in(run, data))
    planes = world.agree(lambda: _planes(run, recipe.groups if recipe.refine.epochs else 0))
    job, model = prepare_saved(recipe, world)
    names = sorted({name for plane in planes for name in (*plane.names, *plane.others)})
    vectors = world.agree(
        lambda: {name: vector_of(run / f"{name}.safetensors", model) for name in names}
    )
    errors = _Errors(model, _with_less_batchnorm(job, samples), samples)
    progress = _Progress(len(planes) * (points**2 + 3), world, show)
    content = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "samples": samples,
        **({"measured": "loss"} if errors.measured == "loss" else {}),
        "planes": [_measure(plane, vectors, points, errors, world, progress) for plane in planes],
    }
    world.first(lambda: write_json(run / "landscape.json", content))
    world.first(lambda: draw_landscape(content, run / "landscape.png"))
    return run / "landscape.png"


def _planes(run: Path, groups: int) -> list[Models]:
    if not (run / "swap.safetensors").is_file():
        raise UserError(
            f"{run}: no swap.safetensors in it: a landscape needs a complete run with a refinement"
        )
    planes = [Models("end of phase 1, a group, the average", ("large_batch", "group-000", "swap"))]
    if groups >= 3:
        planes.append(Models("three groups", ("group-000", "group-001", "group-002"), ("swap",)))
    return planes


def _with_less_batchnorm(job: Job, samples: int) -> Job:
    """Return the job with batch norm re-estimated on at most `samples` images, or one batch."""
    batchnorm = job.recipe.batchnorm
    fewer = min(batchnorm.samples or len(job.dataset.train), max(samples, batchnorm.batch_size))
    changed = batchnorm.model_copy(update={"samples": fewer})
    return replace(job, recipe=job.recipe.model_copy(update={"batchnorm": changed}))


class _Errors:
    """Measures the errors, or the losses, of models on fixed training and test samples."""

    def __init__(self, model: nn.Module, job: Job, samples: int):
        self.model, self.job, self.alone = model, job, Team.alone()
        splits = (job.dataset.train, job.dataset.test)
        self.jobs = [with_test_samples(job, split, samples) for split in splits]
        is_share = job.recipe.metric_names[0] in SHARES
        self.measured: Literal["error", "loss"] = "error" if is_share else "loss"

    def at(self, weights: Tensor) -> tuple[float, float]:
        """Return train and test error, or loss, of the model with these parameters (P,)."""
        fill_parameters_(self.model, weights)
        with self.job.autocast():
            refresh_batchnorm_(self.model, self.job.batchnorm_batches(self.alone), self.alone)
        results = [evaluate_job(self.model, job, self.alone) for job in self.jobs]
        if self.measured == "loss":
            return results[0].loss, results[1].loss
        return 1 - results[0].main, 1 - results[1].main


class _Progress:
    """Counts the points that are done, and shows a line every few seconds."""

    def __init__(self, total: int, world: Team, show: Callable[[str], None]):
        self.total, self.world, self.show, self.done = total, world, show, 0
        self.began = self.shown = perf_counter()

    def step(self) -> None:
        """Count one point of this rank; the other ranks have done about as many."""
        self.done = min(self.total, self.done + self.world.size)
        now = perf_counter()
        if now - self.shown > SECONDS_BETWEEN:
            self.shown = now
            left = (now - self.began) / self.done * (self.total - self.done)
            self.show(f"{self.done:>4} of {self.total} points, {left:.0f} s left")


def _measure(
    plane: Models,
    vectors: dict[str, Tensor],
    points: int,
    errors: _Errors,
    world: Team,
    progress: _Progress,
) -> dict[str, Any]:
    """Return a plane's grid and models with their errors, as `landscape.json` holds them."""
    through = Plane.through(*(vectors[name] for name in plane.names))
    places = {name: through.place(vectors[name]) for name in (*plane.names, *plane.others)}
    x, y = _axes(np.array(list(places.values())), points)
    grid = [(right, up) for right in x for up in y]
    found = np.zeros((len(grid) + len(plane.names), 2))
    for number in share_of_rank(len(found), world):
        # the models themselves come after the grid; a vector is made only when it is needed
        if number < len(grid):
            weights = through.at(*grid[number])
        else:
            weights = vectors[plane.names[number - len(grid)]]
        found[number] = errors.at(weights)
        progress.step()
    world.sum_(found)
    surfaces = found[: len(grid)].reshape(points, points, 2).T  # (2, y, x)
    return {
        "title": plane.title,
        "x": x,
        "y": y,
        f"train_{errors.measured}": surfaces[0].tolist(),
        f"test_{errors.measured}": surfaces[1].tolist(),
        "models": _models(places, plane.names, found[len(grid) :], errors.measured),
    }


def _models(
    places: dict[str, tuple[float, float]], names: Sequence[str], errors: np.ndarray, measured: str
) -> list[dict[str, Any]]:
    """Return the models of a plane.

    Args:
        places: (x, y) of all of them.
        names: those that lie in the plane. The error of any other model is not that of its
            projection, and is left out.
        errors: (3, 2): train and test error, or loss, of these.
        measured: "error" or "loss".
    """
    known = dict(zip(names, errors.tolist(), strict=True))
    models = []
    for name, (x, y) in places.items():
        train, test = known.get(name, (None, None))
        model = {"name": name, "x": x, "y": y, "in_plane": name in known}
        models.append(model | {f"train_{measured}": train, f"test_{measured}": test})
    return models


def _axes(places: np.ndarray, points: int) -> list[list[float]]:
    """Return x and y of the grid around models at `places`, (models, 2)."""
    low, high = places.min(0), places.max(0)
    margin = MARGIN * (high - low).max()
    ends = zip(low - margin, high + margin, strict=True)
    return [np.linspace(start, end, points).tolist() for start, end in ends]
