"""The greedy average: a group is kept where the metric on validation samples does not fall.

Model soups (Wortsman et al., arXiv 2203.05482), recipe 1, over the groups of a run.
"""

from collections.abc import Sequence
from math import isnan
from pathlib import Path

from torch import nn

from swap_hpc.average.agreement import check_equal
from swap_hpc.average.uniform import WeightSum, average_weights_
from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team
from swap_hpc.run.saved import Result, prepare_average, sum_of_groups
from swap_hpc.run.weights import save_model
from swap_hpc.train.evaluation import evaluate_for_report, evaluate_job
from swap_hpc.train.job import Job


def greedy_average(
    run: Path, groups: Sequence[int] | None, data: Path | None, world: Team
) -> Result:
    """Average the groups of a run that improve the average on its validation split.

    The groups are sorted by the main metric on the validation split, the best first; of equal ones
    the one with the lower number. Each is added in turn, and kept where the average is not worse by
    that metric. Whatever is compared has its batch norm refreshed. With several cycles a group
    counts with the weights at the ends of all of them.

    Every rank reads every group's file, one at a time. The result is the same on any number of
    ranks, but for ties that the rounding of batch norm decides.

    Args:
        run: the run's folder; the model is written into it, as `average-greedy.safetensors`.
        groups: the groups to choose from; None: all.
        data: where the data are; None: where the recipe says.
        world: all ranks.

    Raises:
        UserError: on all ranks, as `average`; or the data have no validation split.
    """
    job, model, chosen = prepare_average(run, groups, data, world)
    if job.dataset.validation is None:
        raise UserError(
            f"{run}: a greedy average chooses by validation samples, and the run has none: train "
            "with data.validation=N, or with a folder val beside test"
        )
    recipe, metric = job.recipe, job.recipe.metrics[0]

    def sum_of(group: int) -> WeightSum:
        return world.agree(lambda: sum_of_groups([group], run, recipe, model))

    alone = {group: _score(model, job, world, sum_of(group)) for group in chosen}
    sign = 1 if metric.smaller_is_better else -1
    order = sorted(chosen, key=lambda group: (isnan(alone[group]), sign * alone[group], group))
    members, total = order[:1], sum_of(order[0])
    best = alone[order[0]]
    for group in order[1:]:
        candidate = WeightSum()
        candidate.merge_(total)
        candidate.merge_(sum_of(group))
        score = _score(model, job, world, candidate)
        if not metric.better(best, than=score):
            members, total, best = [*members, group], candidate, score
    _average_(model, job, world, total)
    digest = check_equal(model, world)
    file = run / "average-greedy.safetensors"
    save_model(model, file, job.header, world)
    found = evaluate_for_report(model, job, world)
    return Result(file, found, digest, job.dataset.notes, tuple(members))


def _average_(model: nn.Module, job: Job, world: Team, total: WeightSum) -> None:
    """Give `model` the mean of a sum that every rank holds, its batch norm refreshed."""
    average_weights_(model, Team.alone(), total)
    job.refresh_batchnorm_(model, world)


def _score(model: nn.Module, job: Job, world: Team, total: WeightSum) -> float:
    _average_(model, job, world, total)
    return evaluate_job(model, job, world, "validation").main
