"""The costs of a machine, from what `swap-hpc bench scaling` measured there, and from `--cost`."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swap_hpc.bench.cost_model import GRADIENT, Costs, ring_messages, tree_messages
from swap_hpc.errors import UserError

Case = dict[str, Any]  # of scaling.json


class Calibration(NamedTuple):
    """Measured costs, and the model whose samples they are about."""

    costs: Costs
    width: int  # of that ResNet-9


def read_calibration(file: Path) -> Calibration:
    """Return the costs that `swap-hpc bench scaling` measured.

    Raises:
        UserError: the file does not hold them.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        cores = found["machine"]["cores"]
        cases = [case for case in found["cases"] if _shares_no_core(case, cores)]
        costs = fit_costs(cases, cores)
        return Calibration(costs, min(case["width"] for case in cases))
    except OSError as error:
        why = "" if isinstance(error, FileNotFoundError) else f" ({error.strerror})"
        raise UserError(
            f"no calibration {file}{why}: swap-hpc bench scaling writes it, "
            "or give --cost sample=SECONDS"
        ) from None
    except (KeyError, ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{file} is not what swap-hpc bench scaling writes ({error!r})") from None


def _shares_no_core(case: Case, cores: int) -> bool:
    """Tell whether each rank had a core: what several ranks on one take, the model computes."""
    ranks: int = case["ranks"]
    on_a_host: int = case.get("ranks_on_a_host", ranks)
    return ranks <= 2 or on_a_host <= cores


def fit_costs(cases: Sequence[Case], cores: int) -> Costs:
    """Return the costs that explain measurements.

    Args:
        cases: of `scaling.json`, with 1, 2 and more ranks. The cost of a sample is that of the
            narrowest model among them, while the most ranks compute at the same time.
        cores: of the host that was measured.
    """
    width = min(case["width"] for case in cases)
    narrow = [case for case in cases if case["width"] == width]
    (alone,) = (case for case in narrow if case["ranks"] == 1)
    costs = replace(_fit_computing(alone), cores=cores)
    slower = _slower_than_alone(narrow, alone)
    latency, per_byte = _fit_communication(cases, costs, slower)
    # Ranks share a host's memory and caches, or their hosts do.
    crowd = slower[max(slower)]
    costs = replace(
        costs, sample=costs.sample * crowd, step=costs.step * crowd, growth=costs.growth * crowd
    )
    # Where computing hides all communication, it is not free: the costs stay at their defaults.
    if latency > 1e-9:
        costs = replace(costs, latency=latency)
    if per_byte > 1e-12:
        costs = replace(costs, bandwidth=1 / per_byte)
    return costs


def _fit_computing(alone: Case) -> Costs:
    """Fit the costs of samples and steps to the small and the large steps of one rank.

    Its refinement is computing alone, and so is its phase 1, in larger steps. If a sample takes
    less time there, a step costs something beside its samples. If it takes more, large steps
    outgrow the caches.
    """
    small, large = alone["batch_sizes"]["refine"], alone["batch_sizes"]["large_batch"]
    samples = alone["samples"]
    in_small, in_large = (_seconds(alone, phase) / samples for phase in ("refine", "large_batch"))
    if in_large > in_small:
        growth = (in_large - in_small) / math.log2(large / small)
        return Costs(in_small, 0.0, growth, small=small, large=large)
    rows, seconds = [(1.0, 1 / small), (1.0, 1 / large)], [in_small, in_large]
    sample, step = _least_squares(rows, seconds, seconds)
    return Costs(sample, step, small=small, large=large)


def _slower_than_alone(cases: Sequence[Case], alone: Case) -> dict[int, float]:
    """Return by how much refinement slows down while so many ranks refine, by their number."""
    by_ranks: dict[int, list[float]] = {}
    for case in cases:
        per_sample = _seconds(case, "refine") / case["samples"]
        by_ranks.setdefault(case["ranks"], []).append(per_sample)
    in_one = _seconds(alone, "refine") / alone["samples"]
    return {ranks: float(np.mean(found)) / in_one for ranks, found in by_ranks.items()}


def _fit_communication(
    cases: Sequence[Case], costs: Costs, slower: Mapping[int, float]
) -> tuple[float, float]:
    """Return the seconds of a message, and of a byte.

    They are what phase 1 of several ranks takes beyond computing. How long it computes follows from
    the refinement of the same case, so that models of any width serve.

    Args:
        cases: of any number of ranks.
        costs: of computing, while one rank computes.
        slower: by how much computing slows down on more ranks, by their number.
    """
    small, large = costs.small, costs.large
    together = [case for case in cases if case["ranks"] > 1]
    seconds, whole = [], []  # of a step: beyond computing, and all
    for case in together:
        ranks, steps = case["ranks"], case["samples"] / large
        step = costs.step * slower.get(ranks, 1.0)
        samples_alone = _seconds(case, "refine") - case["samples"] / small * step
        more = costs.per_sample(large / ranks) / costs.per_sample(small)
        computing = samples_alone / ranks * more + steps * step
        whole.append(_seconds(case, "large_batch") / steps)
        seconds.append(max(0.0, whole[-1] - computing / steps))
    fits = [_least_squares(messages, seconds, whole) for messages in _choices(together)]

    def error(fit: tuple[float, float]) -> float:
        """Return the squared error of two costs, where each case takes its faster kind."""
        fastest = [min(np.dot(kind, fit) for kind in _kinds(case)) for case in together]
        return float(np.sum(((fastest - np.array(seconds)) / whole) ** 2))

    return min(fits, key=error, default=(0.0, 0.0))


def _choices(cases: Sequence[Case]) -> Iterator[Sequence[tuple[float, float]]]:
    """Yield the messages of the cases, and their bytes: each case's by a ring or by a tree."""
    return product(*(_kinds(case) for case in cases))


def _kinds(case: Case) -> list[tuple[float, float]]:
    """Return the messages of an allreduce of a case's gradients, and the bytes that they carry."""
    ranks, size = case["ranks"], GRADIENT * case["parameters"]
    kinds = [ring_messages(size, ranks), tree_messages(size, ranks)]
    return kinds[: 1 if ranks == 2 else 2]  # of two ranks the ring is never slower


def _seconds(case: Case, phase: str) -> float:
    return case["phases"][phase]["seconds"]


def _least_squares(
    rows: Sequence[tuple[float, float]], values: Sequence[float], wholes: Sequence[float]
) -> tuple[float, float]:
    """Return two costs, neither below zero, with the least errors relative to `wholes`."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    weights = 1 / np.array(wholes)
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
