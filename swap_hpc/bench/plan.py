"""What a recipe would take on more ranks than are at hand: predictions of a stated cost model, calibrated by measurements.

The model: a step's samples are shared out to the ranks; each takes `sample` seconds of a core or GPU, and a step `step` seconds
beside them. Where a rank's share of a step outgrows the caches, between `small` and `large` samples, each doubling adds `growth`
seconds to each of them. Ranks beyond the `cores` of a host share them. A message takes `latency` seconds and its bytes by `bandwidth`; an
allreduce of N ranks is 2 (N - 1) messages of 1 / N of the bytes (a ring) or 2 log2 N of all of them (a tree), what is less.
Saves go to one file system, at `disk` bytes per second in all. Evaluations, and meetings of the groups before the last, are left out.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from swap_hpc.errors import UserError
from swap_hpc.recipe.markdown import markdown_table
from swap_hpc.recipe.schema import LargeBatch, Model, Recipe, Refine
from swap_hpc.run.checks import check_ranks

GRADIENT, SUM = 4, 8  # bytes of an element: gradients are float32, sums of weights float64


FORWARD = 1 / 3  # of a sample's forward and backward pass


PHASES = {
    "large_batch": "phase 1",
    "refine": "phase 2",
    "average": "average",
    "batchnorm": "batchnorm",
    "save": "save",
}


@dataclass(frozen=True)
class Costs:
    """Of a machine. Seconds, bytes, bytes per second."""

    sample: float  # forward and backward pass of one sample, by one rank
    step: float  # of a step beside its samples: the optimizer, launches
    growth: float = 0.0  # more for each sample with each doubling of a rank's share of a step ...
    small: float = 128.0  # ... beyond so many samples
    large: float = 1024.0  # ... up to so many
    latency: float = 20e-6
    bandwidth: float = 10e9  # of a rank's messages
    disk: float = 1e9  # of the file system, all ranks together
    cores: float | None = None  # of the one host that all ranks share; None: every rank has its own

    def allreduce(self, size: float, ranks: int) -> float:
        """Seconds, for that many bytes."""
        ring = 2 * (ranks - 1) * (self.latency + size / ranks / self.bandwidth)
        tree = 2 * math.ceil(math.log2(ranks)) * (self.latency + size / self.bandwidth)
        return min(ring, tree)

    def compute(self, samples: float, steps: float, ranks: int) -> float:
        """Seconds of a rank's steps, when all `ranks` of the job compute."""
        crowd = max(1.0, ranks / self.cores) if self.cores else 1.0
        return (
            samples * self.of_a_sample(samples / steps if steps else 0) + steps * self.step
        ) * crowd

    def of_a_sample(self, share: float) -> float:
        """Seconds, in a step of which a rank has that many."""
        return self.sample + self.growth * math.log2(
            min(max(share, self.small), self.large) / self.small
        )


@dataclass(frozen=True)
class Work:
    """What there is to do, whatever does it."""

    recipe: Recipe
    samples: int
    parameters: int


def predict(work: Work, costs: Costs, ranks: int) -> dict[str, float]:
    """Seconds of each phase of a recipe on `ranks` ranks, by name; those of saving as one more."""
    recipe, size = work.recipe, work.parameters
    per_group = max(1, ranks // recipe.groups)
    in_turn = max(1, recipe.groups // ranks)
    saved = 2 * GRADIENT * size / costs.disk  # weights and momentum
    refine = recipe.refine.epochs * recipe.refine.cycles
    batches = (
        recipe.batchnorm.samples or work.samples
    ) // recipe.batchnorm.batch_size  # whole ones are dealt out
    first = epoch(work, costs, recipe.large_batch, ranks, ranks)
    second = epoch(work, costs, recipe.refine, per_group, ranks)
    # groups write at once, and share the file system
    saves = (
        recipe.checkpoint.saves(recipe.large_batch.epochs, first)
        + recipe.checkpoint.saves(refine, second) * recipe.groups
    )
    return {
        "large_batch": recipe.large_batch.epochs * first,
        "refine": refine * in_turn * second,
        "average": costs.allreduce(SUM * size, min(ranks, recipe.groups))
        if refine
        else 0.0,  # over peers
        "batchnorm": costs.compute(
            FORWARD * math.ceil(batches / ranks) * recipe.batchnorm.batch_size, 0, ranks
        )
        if refine
        else 0.0,
        "save": saved * saves,
    }


def epoch(work: Work, costs: Costs, phase: LargeBatch | Refine, team: int, ranks: int) -> float:
    """Seconds of one epoch of a phase, trained by a team of ranks while all `ranks` of the job train."""
    steps = work.samples // phase.batch_size
    return costs.compute(steps * phase.batch_size / team, steps, ranks) + steps * costs.allreduce(
        GRADIENT * work.parameters, team
    )


def baselines(recipe: Recipe) -> dict[str, Recipe]:
    """SWAP, and plain SGD with its small and with its large batches for as many epochs."""
    first, refine = recipe.large_batch, recipe.refine
    epochs = first.epochs + refine.epochs * refine.cycles
    alone = recipe.model_copy(
        update={"refine": refine.model_copy(update={"epochs": 0}), "groups": 1}
    )
    made = {}
    for name, size in (("small batch", refine.batch_size), ("large batch", first.batch_size)):
        fields = {
            "epochs": epochs,
            "batch_size": size,
            "batchnorm_batch_size": None,
        }  # another batch, another share of it
        made[name] = alone.model_copy(update={"large_batch": first.model_copy(update=fields)})
    return {f"{name} ({each.large_batch.batch_size:,})": each for name, each in made.items()} | {
        "SWAP": recipe
    }


def calibrated(file: Path) -> Costs:
    """The costs that `bench scaling` measured on 1 and 2 ranks. Raises UserError where the file does not hold them."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return fitted(
            [case for case in found["cases"] if case["ranks"] <= 2], found["machine"]["cores"]
        )
    except OSError as error:
        why = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"
        raise UserError(
            f"no calibration {file}{why}: swap-hpc bench scaling writes it, or give --cost sample=SECONDS"
        ) from None
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file} is not what swap-hpc bench scaling writes ({error!r})") from None


def fitted(cases: Sequence[dict[str, Any]], cores: int) -> Costs:
    """From cases of 1 and 2 ranks; a sample's cost is that of the narrowest model.

    Refinement is computing alone, by groups of one rank. So is phase 1 of one rank, in larger steps: where a sample takes less time
    there, a step costs something beside its samples; where it takes more, large steps outgrow the caches. What phase 1 of two
    ranks takes beyond that is communication.
    """
    narrow = [case for case in cases if case["width"] == min(case["width"] for case in cases)]
    (alone,) = (case for case in narrow if case["ranks"] == 1)
    small, large = alone["batch_sizes"]["refine"], alone["batch_sizes"]["large_batch"]
    rows = [(case["samples"], case["samples"] / small) for case in narrow] + [
        (alone["samples"], alone["samples"] / large)
    ]
    values = [case["phases"]["refine"]["seconds"] for case in narrow] + [
        alone["phases"]["large_batch"]["seconds"]
    ]
    costs = Costs(*_least_squares(rows, values), small=small, large=large, cores=cores)
    in_small = float(
        np.mean(
            [
                seconds / samples
                for (samples, _), seconds in zip(rows[:-1], values[:-1], strict=True)
            ]
        )
    )
    in_large = values[-1] / alone["samples"]
    if in_large > in_small:
        costs = replace(
            costs,
            sample=in_small,
            step=0.0,
            growth=(in_large - in_small) / math.log2(large / small),
        )
    rows, values = [], []
    for case in cases:
        if case["ranks"] == 2:
            steps, phases = case["samples"] / large, case["phases"]
            of_samples = (
                phases["refine"]["seconds"] - case["samples"] / small * costs.step
            )  # of any width
            computing = (
                of_samples / 2 * costs.of_a_sample(large / 2) / costs.of_a_sample(small)
                + steps * costs.step
            )
            rows.append((2.0, GRADIENT * case["parameters"]))
            values.append(max(0.0, phases["large_batch"]["seconds"] - computing) / steps)
    latency, per_byte = _least_squares(rows, values)
    if (
        latency > 1e-9
    ):  # where computing hides all of it, communication is not free: then it stays as it is by default
        costs = replace(costs, latency=latency)
    return replace(costs, bandwidth=1 / per_byte) if per_byte > 1e-12 else costs


def _least_squares(
    rows: Sequence[tuple[float, float]], values: Sequence[float]
) -> tuple[float, float]:
    """Of two costs, neither below zero, each equation weighed by its own size."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    weights = 1 / np.maximum(np.array(values), 1e-9)
    (first, second), _ = nnls(np.array(rows) * weights[:, None], np.array(values) * weights)
    return float(first), float(second)


# Training samples, pixels, channels, classes
KNOWN = {
    "digits": (1198, 8, 1, 10),
    "cifar10": (50_000, 32, 3, 10),
    "cifar100": (50_000, 32, 3, 100),
}


CALIBRATED_ON = (10, 3, 32)  # classes, channels, pixels of what `bench scaling` trains

Size = Callable[[Model, int, int, int], tuple[int, int]]  # `models.size`, which loads torch


def text(
    recipe: Recipe,
    ranks: Sequence[int],
    samples: int | None,
    calibration: Path,
    overrides: Sequence[str],
    size: Size,
) -> str:
    """What `swap-hpc plan` prints. Raises UserError for what it cannot predict from."""
    if any(number < 1 for number in ranks):
        raise UserError("--ranks: each number has to be at least 1")
    known, pixels, channels, classes = KNOWN.get(
        recipe.data.name, (0, recipe.data.last_size or 32, 3, recipe.data.classes)
    )
    samples = samples or known or (recipe.data.samples if recipe.data.name == "synthetic" else 0)
    if not samples:
        raise UserError(
            f"the data {recipe.data.name} does not say how many training samples it has: --samples 1281167, say"
        )
    for phase, section in (("large_batch", recipe.large_batch), ("refine", recipe.refine)):
        if section.epochs and section.batch_size > samples:
            raise UserError(
                f"{phase}.batch_size = {section.batch_size}, but there are {samples} training samples"
            )
    parameters, operations = size(recipe.model, classes, channels, pixels)
    chosen = dict(_cost(each) for each in overrides)
    if "sample" in chosen:
        costs, source = Costs(chosen["sample"], chosen.get("step", 0.0)), "given"
    else:
        costs, source = calibrated(calibration), f"measured ({calibration})"
        width = min(
            case["width"] for case in json.loads(calibration.read_text(encoding="utf-8"))["cases"]
        )
        _, reference = size(
            Model.model_validate({"name": "resnet9", "width": width}), *CALIBRATED_ON
        )
        costs = replace(
            costs,
            sample=costs.sample * operations / reference,
            growth=costs.growth * operations / reference,
            cores=None,
        )
    costs = replace(costs, **chosen)
    work = Work(recipe, samples, parameters)
    head = f"{recipe.name}: {samples:,} samples, {parameters / 1e6:.2f} million parameters, {recipe.groups} groups"
    lines = [f"{head}. Predictions, not measurements:", "", table(work, costs, ranks), ""]
    for number in ranks:
        sent = bytes_per_image(work, number)
        lines.append(
            f"{number:,} ranks: a rank sends {sent['large_batch']:,.0f} bytes per image in phase 1, {sent['refine']:,.0f} in phase 2"
        )
    stated = ", ".join(
        f"{name}={value:.3g}" for name, value in asdict(costs).items() if value is not None
    )
    return "\n".join([*lines, "", f"costs in seconds, and bytes per second, {source}: {stated}"])


def _cost(override: str) -> tuple[str, float]:
    name, _, value = override.partition("=")
    names = [field.name for field in fields(Costs)]
    with suppress(ValueError):
        number = float(value)
        if (
            name in names
            and math.isfinite(number)
            and (number > 0 or (number == 0 and name in ("sample", "step", "growth", "latency")))
        ):
            return name, number
    raise UserError(
        f"--cost {override}: write it as {names[0]}=0.001; there are {', '.join(names)}"
    )


def table(work: Work, costs: Costs, ranks: Sequence[int]) -> str:
    """Predictions as Markdown: a row per method and number of ranks."""
    rows = []
    for number in ranks:
        for name, recipe in baselines(work.recipe).items():
            refused = _refused(recipe, number)
            if refused is None:
                seconds = predict(replace(work, recipe=recipe), costs, number)
                limit = max(PHASES, key=lambda phase: seconds[phase])
                cells = [f"{seconds[phase]:,.3g}" for phase in PHASES]
                rows.append(
                    (
                        f"{number:,}",
                        name,
                        *cells,
                        f"{sum(seconds.values()):,.4g}",
                        _why(work, recipe, costs, number, limit),
                    )
                )
            else:
                rows.append((f"{number:,}", name, *["-"] * len(PHASES), "-", refused))
    return markdown_table(
        (
            "ranks",
            "method",
            *(f"{phase}, s" for phase in PHASES.values()),
            "total, s",
            "what limits",
        ),
        rows,
    )


def _refused(recipe: Recipe, ranks: int) -> str | None:
    """Why a recipe does not run on so many ranks; None where it does."""
    try:
        check_ranks(recipe, ranks)
    except UserError as error:
        return str(error).partition(": ")[0]  # what mends a run of it is not asked for
    return None


def _why(work: Work, recipe: Recipe, costs: Costs, ranks: int, limit: str) -> str:
    """The phase that takes longest, and what of it does."""
    if limit not in ("large_batch", "refine"):
        return limit
    phase = recipe.large_batch if limit == "large_batch" else recipe.refine
    team = ranks if limit == "large_batch" else max(1, ranks // recipe.groups)
    share = (
        costs.allreduce(GRADIENT * work.parameters, team)
        * (work.samples // phase.batch_size)
        / epoch(work, costs, phase, team, ranks)
    )
    return f"{PHASES[limit]}: {'communication' if share > 0.5 else 'computing'}, {100 * max(share, 1 - share):.0f} %"


def bytes_per_image(work: Work, ranks: int) -> dict[str, float]:
    """That one rank sends for each image that all train on, by phase."""
    size, recipe = GRADIENT * work.parameters, work.recipe
    per_group = max(1, ranks // recipe.groups)
    return {
        "large_batch": 2 * (ranks - 1) / ranks * size / recipe.large_batch.batch_size,
        "refine": 2 * (per_group - 1) / per_group * size / recipe.refine.batch_size,
    }
