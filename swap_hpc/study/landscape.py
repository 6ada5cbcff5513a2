"""Train and test error on planes through the weights of a run, after the paper's figures of the loss landscape."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from torch import Tensor, nn

from swap_hpc.average.batchnorm import refresh_batchnorm_
from swap_hpc.errors import UserError
from swap_hpc.parallel.atomic import write_json
from swap_hpc.parallel.teams import Team
from swap_hpc.run.saved import prepare_saved, recipe_in
from swap_hpc.study import figures
from swap_hpc.study.planes import Plane, fill_parameters_, seen_as_tests, shared_out, vector_of
from swap_hpc.train.evaluation import evaluate_job
from swap_hpc.train.job import Job

MARGIN = 0.35  # of the span of the three models, around them


SECONDS_BETWEEN = 5.0  # lines that tell how far it is


@dataclass(frozen=True)
class Models:
    """A plane's three models, and those that are only projected onto it."""

    title: str
    names: tuple[str, str, str]
    others: tuple[str, ...] = ()


def landscape(
    run: Path,
    data: Path | None,
    points: int,
    samples: int,
    world: Team,
    tell: Callable[[str], None],
) -> Path:
    """Evaluates a grid of `points` x `points` models on each plane, and writes `landscape.json` and `landscape.png` into the run's folder.

    The planes go through the end of phase 1, group 0 and the average; and, where there are three groups, through three of them. At
    each point batch norm is re-estimated on up to `samples` augmented training images, and the error is that of up to `samples`
    training and test images, always the same ones. The points are shared out to the ranks. Source: Garipov et al. 2018, and
    section 4 of the SWAP paper. Returns the figure's path. Raises UserError, on all ranks, for what is no complete run with a refinement.
    """
    recipe = world.agree(lambda: recipe_in(run, data))
    planes = world.agree(lambda: _planes(run, recipe.groups if recipe.refine.epochs else 0))
    job, model = prepare_saved(recipe, world)
    names = sorted({name for plane in planes for name in (*plane.names, *plane.others)})
    vectors = world.agree(
        lambda: {name: vector_of(run / f"{name}.safetensors", model) for name in names}
    )
    errors = _Errors(model, _with_less_batchnorm(job, samples), samples)
    progress = _Progress(len(planes) * (points**2 + 3), world, tell)
    content = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "samples": samples,
        "planes": [_surface(plane, vectors, points, errors, world, progress) for plane in planes],
    }
    world.first(lambda: write_json(run / "landscape.json", content))
    world.first(lambda: figures.landscape(content, run / "landscape.png"))
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
    """The job, batch norm re-estimated on up to that many samples; at least one batch."""
    batchnorm = job.recipe.batchnorm
    fewer = min(batchnorm.samples or len(job.dataset.train), max(samples, batchnorm.batch_size))
    return replace(
        job,
        recipe=job.recipe.model_copy(
            update={"batchnorm": batchnorm.model_copy(update={"samples": fewer})}
        ),
    )


class _Errors:
    """The share of training and of test images that a model is wrong about."""

    def __init__(self, model: nn.Module, job: Job, samples: int):
        self.model, self.job, self.alone = model, job, Team.alone()
        self.splits = [
            seen_as_tests(job, split, samples) for split in (job.dataset.train, job.dataset.test)
        ]

    def at(self, weights: Tensor) -> tuple[float, float]:
        fill_parameters_(self.model, weights)
        with self.job.autocast():
            refresh_batchnorm_(self.model, self.job.batchnorm_batches(self.alone), self.alone)
        train, test = (
            1 - evaluate_job(self.model, split, self.alone).accuracy for split in self.splits
        )
        return train, test


class _Progress:
    def __init__(self, total: int, world: Team, tell: Callable[[str], None]):
        self.total, self.world, self.tell, self.done = total, world, tell, 0
        self.began = self.told = perf_counter()

    def step(self) -> None:
        """One more of this rank's points; the others' are about as many."""
        self.done = min(self.total, self.done + self.world.size)
        now = perf_counter()
        if now - self.told > SECONDS_BETWEEN:
            self.told = now
            left = (now - self.began) / self.done * (self.total - self.done)
            self.tell(f"{self.done:>4} of {self.total} points, {left:.0f} s left")


def _surface(
    plane: Models,
    vectors: dict[str, Tensor],
    points: int,
    errors: _Errors,
    world: Team,
    progress: _Progress,
) -> dict[str, Any]:
    through = Plane.through(*(vectors[name] for name in plane.names))
    places = {name: through.place(vectors[name]) for name in (*plane.names, *plane.others)}
    x, y = _axes(np.array(list(places.values())), points)
    weights: list[Callable[[], Tensor]] = [lambda at=at: through.at(*at) for at in product(x, y)]  # type: ignore[misc]
    weights += [lambda name=name: vectors[name] for name in plane.names]  # type: ignore[misc]
    found = np.zeros((len(weights), 2))
    for point in shared_out(len(weights), world):
        found[point] = errors.at(weights[point]())
        progress.step()
    train, test = world.sum_(found).T
    grid = slice(None, points**2)
    return {
        "title": plane.title,
        "x": x,
        "y": y,
        "train_error": train[grid].reshape(points, points).T.tolist(),  # a row for each y
        "test_error": test[grid].reshape(points, points).T.tolist(),
        "models": list(_models(places, plane.names, train[points**2 :], test[points**2 :])),
    }


def _models(
    places: dict[str, tuple[float, float]],
    names: tuple[str, ...],
    train: np.ndarray,
    test: np.ndarray,
) -> Iterator[dict[str, Any]]:
    for name, (x, y) in places.items():
        in_plane = name in names  # the errors of others are not those of their projections
        errors = (train[names.index(name)], test[names.index(name)]) if in_plane else (None, None)
        yield {
            "name": name,
            "x": x,
            "y": y,
            "in_plane": in_plane,
            "train_error": errors[0],
            "test_error": errors[1],
        }


def _axes(places: np.ndarray, points: int) -> list[list[float]]:
    """The grid's x and its y, around models at `places` (models, 2)."""
    low, high = places.min(0), places.max(0)
    margin = MARGIN * (high - low).max()
    return [
        np.linspace(low[axis] - margin, high[axis] + margin, points).tolist() for axis in (0, 1)
    ]
