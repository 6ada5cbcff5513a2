"""The costs of a machine, from what `swap-hpc bench scaling` measured there, and from `--cost`."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swap_hpc.bench.cost_model import GRADIENT, Costs
from swap_hpc.errors import UserError

Case = dict[str, Any]  # of scaling.json


class Calibration(NamedTuple):
    """Measured costs, and the model whose samples they are about."""

    costs: Costs
    width: int  # of that ResNet-9


def read_calibration(file: Path) -> Calibration:
    """Return the costs that `swap-hpc bench scaling` measured on 1 and 2 ranks.

    Raises:
        UserError: the file does not hold them.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        cases = [case for case in found["cases"] if case["ranks"] <= 2]
        costs = fit_costs(cases, found["machine"]["cores"])
        return Calibration(costs, min(case["width"] for case in cases))
    except OSError as error:
        why = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"
        raise UserError(
            f"no calibration {file}{why}: swap-hpc bench scaling writes it, "
            "or give --cost sample=SECONDS"
        ) from None
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{file} is not what swap-hpc bench scaling writes ({error!r})") from None


def fit_costs(cases: Sequence[Case], cores: int) -> Costs:
    """Return the costs that explain measurements.

    Args:
        cases: of `scaling.json`, with 1 and 2 ranks. The cost of a sample is that of the narrowest
            model among them.
        cores: of the host that was measured.
    """
    costs = _fit_computing(cases, cores)
    latency, per_byte = _fit_communication(cases, costs)
    # Where computing hides all communication, it is not free: the costs stay at their defaults.
    if latency > 1e-9:
        costs = replace(costs, latency=latency)
    if per_byte > 1e-12:
        costs = replace(costs, bandwidth=1 / per_byte)
    return costs


def _fit_computing(cases: Sequence[Case], cores: int) -> Costs:
    """Fit the costs of samples and steps.

    Refinement by groups of one rank is computing alone. So is phase 1 of one rank, in larger steps.
    If a sample takes less time there, a step costs something beside its samples. If it takes more,
    large steps outgrow the caches.
    """
    width = min(case["width"] for case in cases)
    narrow = [case for case in cases if case["width"] == width]
    (alone,) = (case for case in narrow if case["ranks"] == 1)
    small, large = alone["batch_sizes"]["refine"], alone["batch_sizes"]["large_batch"]
    # An epoch with small steps by each case, and one with large steps by one rank.
    epochs = [(case["samples"], case["samples"] / small) for case in narrow]
    epochs.append((alone["samples"], alone["samples"] / large))
    seconds = [_seconds(case, "refine") for case in narrow]
    seconds.append(_seconds(alone, "large_batch"))

    in_small = float(np.mean([_seconds(case, "refine") / case["samples"] for case in narrow]))
    in_large = _seconds(alone, "large_batch") / alone["samples"]
    if in_large > in_small:
        growth = (in_large - in_small) / math.log2(large / small)
        return Costs(in_small, 0.0, growth, small=small, large=large, cores=cores)
    sample, step = _least_squares(epochs, seconds)
    return Costs(sample, step, small=small, large=large, cores=cores)


def _fit_communication(cases: Sequence[Case], costs: Costs) -> tuple[float, float]:
    """Return the seconds of a message, and of a byte.

    They are what phase 1 of two ranks takes beyond computing. How long it computes follows from the
    refinement of the same case, so that models of any width serve.
    """
    small, large = costs.small, costs.large
    messages, seconds = [], []
    for case in cases:
        if case["ranks"] == 2:
            steps = case["samples"] / large
            samples_alone = _seconds(case, "refine") - case["samples"] / small * costs.step
            slower = costs.per_sample(large / 2) / costs.per_sample(small)
            computing = samples_alone / 2 * slower + steps * costs.step
            # An allreduce of two ranks is two messages, which carry all bytes together.
            messages.append((2.0, GRADIENT * case["parameters"]))
            seconds.append(max(0.0, _seconds(case, "large_batch") - computing) / steps)
    return _least_squares(messages, seconds)


def _seconds(case: Case, phase: str) -> float:
    return case["phases"][phase]["seconds"]


def _least_squares(
    rows: Sequence[tuple[float, float]], values: Sequence[float]
) -> tuple[float, float]:
    """Return two costs, neither below zero, with the least error relative to each value."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    weights = 1 / np.maximum(np.array(values), 1e-9)
    (first, second), _ = nnls(np.array(rows) * weights[:, None], np.array(values) * weights)
    return float(first), float(second)


def parse_cost(override: str) -> tuple[str, float]:
    """Return the name and the value of a `--cost`, for example "bandwidth=25e9".

    Raises:
        UserError: it names no cost, or the value is none.
    """
    name, _, value = override.partition("=")
    names = [field.name for field in fields(Costs)]
    with suppress(ValueError):
        number = float(value)
        if name in names and math.isfinite(number) and _allowed(name, number):
            return name, number
    raise UserError(
        f"--cost {override}: write it as {names[0]}=0.001; there are {', '.join(names)}"
    )


def _allowed(name: str, value: float) -> bool:
    may_be_zero = name in ("sample", "step", "growth", "latency")
    return value > 0 or (value == 0 and may_be_zero)
