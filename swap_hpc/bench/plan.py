"""What `swap-hpc plan` prints: predictions for a recipe on more ranks than are at hand."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from swap_hpc.bench import worth
from swap_hpc.bench.calibration import parse_cost, read_calibration
from swap_hpc.bench.cost_model import (
    Costs,
    Work,
    baselines,
    bytes_per_image,
    communication_seconds,
    epoch_seconds,
    predict,
    team_size,
)
from swap_hpc.errors import UserError
from swap_hpc.recipe.inputs import Data, Model
from swap_hpc.recipe.markdown import markdown_table
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.wording import count
from swap_hpc.run.checks import check_ranks
from swap_hpc.train import models

# The columns of the table: what `predict` returns, and its name.
PHASES = {
    "large_batch": "phase 1",
    "refine": "phase 2",
    "average": "average",
    "batchnorm": "batchnorm",
    "save": "save",
}


class Shape(NamedTuple):
    """The size of a data set."""

    samples: int  # for training; 0: unknown
    pixels: int  # the side of an image
    channels: int
    classes: int


# The data sets whose size does not depend on the recipe.
KNOWN = {
    "digits": Shape(1198, 8, 1, 10),
    "cifar10": Shape(50_000, 32, 3, 10),
    "cifar100": Shape(50_000, 32, 3, 100),
}
CALIBRATED_ON = Shape(0, pixels=32, channels=3, classes=10)  # by `bench scaling`


def text(
    recipe: Recipe,
    ranks: Sequence[int],
    samples: int | None,
    calibration: Path,
    overrides: Sequence[str],
) -> str:
    """Return what `swap-hpc plan` prints.

    Args:
        recipe: of the run.
        ranks: numbers of ranks to predict.
        samples: for training; None: as many as the data set is known to have.
        calibration: what `swap-hpc bench scaling` wrote; not read if `sample` is overridden.
        overrides: of costs, for example "bandwidth=25e9".

    Raises:
        UserError: nothing can be predicted from these arguments.
    """
    if any(number < 1 for number in ranks):
        raise UserError("--ranks: each number has to be at least 1")
    shape = _shape(recipe.data, samples)
    _check_batch_sizes(recipe, shape.samples)
    parameters, operations = _size(recipe.model, shape)
    costs, source = _costs(operations, calibration, overrides)
    work = Work(recipe, shape.samples, parameters)
    values = ", ".join(
        f"{name}={value:.3g}" for name, value in asdict(costs).items() if value is not None
    )
    return "\n".join(
        [
            f"{recipe.name}: {shape.samples:,} samples, {parameters / 1e6:.2f} million parameters, "
            f"{count(recipe.groups, 'group')}. Predictions, not measurements:",
            "",
            table(work, costs, ranks),
            "",
            *worth.lines(work, costs, ranks),
            "",
            *(_traffic(work, number) for number in ranks),
            "",
            f"costs in seconds, and bytes per second, {source}: {values}",
        ]
    )


def _shape(data: Data, samples: int | None) -> Shape:
    from_recipe = Shape(
        samples=data.samples if data.name == "synthetic" else 0,
        pixels=data.last_size or 32,
        channels=3,
        classes=data.classes,
    )
    shape = KNOWN.get(data.name, from_recipe)
    if samples:
        shape = shape._replace(samples=samples)
    if not shape.samples:
        raise UserError(
            f"the data set {data.name} does not state its number of training samples: "
            "give it, for example --samples 1281167"
        )
    return shape


def _check_batch_sizes(recipe: Recipe, samples: int) -> None:
    for phase, section in (("large_batch", recipe.large_batch), ("refine", recipe.refine)):
        if section.epochs and section.batch_size > samples:
            raise UserError(
                f"{phase}.batch_size = {section.batch_size}, "
                f"but there are {samples} training samples"
            )


def _size(model: Model, shape: Shape) -> tuple[int, int]:
    """Return a model's parameters, and its floating-point operations for one image."""
    return models.size(model, shape.classes, shape.channels, shape.pixels)


def _costs(operations: int, calibration: Path, overrides: Sequence[str]) -> tuple[Costs, str]:
    """Return the costs of a model with so many operations per image, and where they are from."""
    chosen = dict(parse_cost(each) for each in overrides)
    if "sample" in chosen:
        return Costs(**({"step": 0.0} | chosen)), "given"
    costs, width = read_calibration(calibration)
    measured = Model.model_validate({"name": "resnet9", "width": width})
    _, operations_measured = _size(measured, CALIBRATED_ON)
    costs = replace(
        costs,
        sample=costs.sample * operations / operations_measured,
        growth=costs.growth * operations / operations_measured,
        cores=None,  # on a cluster every rank has cores or a GPU of its own
    )
    return replace(costs, **chosen), f"measured ({calibration})"


def _traffic(work: Work, ranks: int) -> str:
    sent = bytes_per_image(work, ranks)
    return (
        f"{count(ranks, 'rank')}: a rank sends {sent['large_batch']:,.0f} bytes per image "
        f"in phase 1, {sent['refine']:,.0f} in phase 2"
    )


def table(work: Work, costs: Costs, ranks: Sequence[int]) -> str:
    """Return predictions as a Markdown table, a row per number of ranks and method."""
    head = (
        "ranks",
        "method",
        *(f"{phase}, s" for phase in PHASES.values()),
        "total, s",
        "what limits",
    )
    rows = [
        (f"{number:,}", method, *_cells(replace(work, recipe=recipe), costs, number))
        for number in ranks
        for method, recipe in baselines(work.recipe).items()
    ]
    return markdown_table(head, rows)


def _cells(work: Work, costs: Costs, ranks: int) -> list[str]:
    """Return the seconds of each phase, their sum, and what limits."""
    refusal = _refusal(work.recipe, ranks)
    if refusal:
        return [*["-"] * len(PHASES), "-", refusal]
    seconds = predict(work, costs, ranks)
    total = sum(seconds.values())
    longest = max(PHASES, key=lambda phase: seconds[phase])
    limit = _limit(work, costs, ranks, longest)
    return [*(f"{seconds[phase]:,.3g}" for phase in PHASES), f"{total:,.4g}", limit]


def _refusal(recipe: Recipe, ranks: int) -> str | None:
    """Return why a recipe does not run on a number of ranks; None if it does."""
    try:
        check_ranks(recipe, ranks)
    except UserError as error:
        # What follows the colon is a hint for somebody who starts the run.
        return str(error).partition(": ")[0]
    return None


def _limit(work: Work, costs: Costs, ranks: int, longest: str) -> str:
    """Return the phase that takes longest, and what takes the larger part of it."""
    if longest not in ("large_batch", "refine"):
        return longest
    recipe = work.recipe
    phase = recipe.large_batch if longest == "large_batch" else recipe.refine
    team = team_size(recipe, longest, ranks)
    communication = communication_seconds(work, costs, phase, team)
    share = communication / epoch_seconds(work, costs, phase, team, ranks)
    kind = "communication" if share > 0.5 else "computing"
    return f"{PHASES[longest]}: {kind}, {100 * max(share, 1 - share):.0f} %"
