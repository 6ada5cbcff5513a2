"""When is SWAP worth it: the network's rate, or the number of ranks, from which on it is faster."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf

import numpy as np

from swap_hpc.bench.cost_model import Costs, Work, baselines, predict
from swap_hpc.errors import UserError
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.wording import bit_rate, count
from swap_hpc.run.checks import check_ranks

SLOWEST, FASTEST = 1e3, 1e15  # bytes per second that are considered
MOST_DOUBLINGS = 17  # of the number of groups
STEPS = 241  # of the rates that are tried: 20 to a factor of ten
HALVINGS = 20  # of the step in which a rate is found


def lines(work: Work, costs: Costs, ranks: Sequence[int]) -> list[str]:
    """Return the answers for a recipe, in lines; none where it does not refine.

    SWAP is compared with small batches on as many of the same ranks as serve them best.

    Args:
        work: the run.
        costs: of the machine.
        ranks: numbers of ranks.
    """
    if not work.recipe.refine.epochs:
        return []
    small = next(iter(baselines(work.recipe)))
    found = [f"SWAP takes less time than {small}, for as many epochs,"]
    for number in ranks:
        if runs(work.recipe, number):
            found.append(f"- on {count(number, 'rank')}: {_rate_in_words(work, costs, number)}")
    found.append(f"- at {bit_rate(8 * costs.bandwidth)} a rank: {_ranks_in_words(work, costs)}")
    return found


def runs(recipe: Recipe, ranks: int) -> bool:
    """Tell whether a recipe runs on a number of ranks."""
    try:
        check_ranks(recipe, ranks)
    except UserError:
        return False
    return True


def slower_by(work: Work, costs: Costs, ranks: int) -> float:
    """Return the seconds that small batches take longer than SWAP; negative where SWAP does.

    Args:
        work: the run by SWAP.
        costs: of the machine.
        ranks: of the job. Small batches run on all, a half, a quarter of them and so on, on
            whichever number takes the least time.
    """
    small = next(iter(baselines(work.recipe).values()))
    fewer = [ranks >> halvings for halvings in range(ranks.bit_length())]
    times = [_seconds(replace(work, recipe=small), costs, n) for n in fewer if runs(small, n)]
    return min(times, default=inf) - _seconds(work, costs, ranks)


def _seconds(work: Work, costs: Costs, ranks: int) -> float:
    return sum(predict(work, costs, ranks).values())


def rates(work: Work, costs: Costs, ranks: int) -> list[tuple[float, float]]:
    """Return the ranges of the rate, bytes per second of a rank, in which SWAP is faster.

    Over a faster network small batches cost little to send. Over a slower one, where the lower
    rate is not 0, even phase 1 takes longer than small batches on fewer ranks. An upper rate that
    is infinite: however fast the network is. The ranges ascend, and there is rarely more than one.
    """

    def is_faster(rate: float) -> bool:
        return slower_by(work, replace(costs, bandwidth=rate), ranks) > 0

    grid = np.geomspace(SLOWEST, FASTEST, STEPS).tolist()
    faster = [is_faster(rate) for rate in grid]
    found, begin = [], 0.0 if faster[0] else inf
    for (slow, before), (fast, after) in pairwise(zip(grid, faster, strict=True)):
        if after and not before:
            begin = _edge(is_faster, fast, slow)
        elif before and not after:
            found.append((begin, _edge(is_faster, slow, fast)))
    return [*found, (begin, inf)] if faster[-1] else found


def _edge(holds: Callable[[float], bool], inside: float, outside: float) -> float:
    """Return the rate between two at which something ceases to hold."""
    for _ in range(HALVINGS):
        middle = (inside * outside) ** 0.5
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return float(inside)


def numbers_of_ranks(work: Work, costs: Costs) -> tuple[int, int | None] | None:
    """Return the fewest ranks with which SWAP is faster, and the most in one row with them.

    The divisors of the number of groups are tried, and the groups times powers of two. None: with
    no number of ranks. None for the most: however many ranks the recipe allows.
    """
    groups = work.recipe.groups
    numbers = [number for number in range(1, groups) if groups % number == 0]
    numbers += [groups * 2**power for power in range(MOST_DOUBLINGS)]
    numbers = [number for number in numbers if runs(work.recipe, number)]
    faster = [slower_by(work, costs, number) > 0 for number in numbers]
    if not any(faster):
        return None
    first = faster.index(True)
    end = faster.index(False, first) if False in faster[first:] else None
    return numbers[first], numbers[end - 1] if end else None


def _rate_in_words(work: Work, costs: Costs, ranks: int) -> str:
    found = rates(work, costs, ranks)
    if not found:
        return "at no rate of the network"
    if found == [(0.0, inf)]:
        return "at any rate of the network"
    return "where a rank gets " + ", or ".join(_range_in_words(*each) for each in found)


def _range_in_words(low: float, high: float) -> str:
    more, less = f"more than {bit_rate(8 * low)}", f"less than {bit_rate(8 * high)}"
    if high == inf:
        return more
    return f"{less} and {more}" if low else less


def _ranks_in_words(work: Work, costs: Costs) -> str:
    found = numbers_of_ranks(work, costs)
    if found is None:
        return "on no number of ranks"
    fewest, most = found
    return f"from {fewest:,} to {most:,} ranks" if most else f"from {count(fewest, 'rank')} on"
