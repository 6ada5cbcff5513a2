"""Properties of whole runs: groups, their average, and equal results on any number of ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from swap_hpc.average.agreement import weights_sha256
from swap_hpc.parallel.grid import Ranks, grid
from swap_hpc.parallel.teams import Team
from swap_hpc.swap import swap
from swap_hpc.train.events import Averaged, GroupArrived, LargeBatchEnded, Refreshed
from swap_hpc.train.job import Job

REFINE_ONLY: dict[str, Any] = {
    "large_batch": {"epochs": 0},
    "model": {"name": "tiny:normed", "weights": "given"},
}


def run(job: Job, ranks: Ranks) -> dict[str, Tensor]:
    """Return every model of a run by name, as this rank holds it."""
    found = {}
    for event in swap(tiny.model(job), job, ranks):
        match event:
            case LargeBatchEnded(model):
                found["large_batch"] = tiny.weights(model).clone()
            case GroupArrived(part, model, _):
                found[part.name] = tiny.weights(model).clone()
            case Averaged(model, _):
                found["average"] = tiny.weights(model).clone()
            case Refreshed(model, _):
                found["batchnorm"] = tiny.weights(model).clone()
    return found


@contextmanager
def alone(groups: int) -> Iterator[Ranks]:
    """Yield the grid of one rank that refines all groups, one after the other."""
    with grid(Team.alone(), groups) as ranks:
        yield ranks


def test_groups_differ_and_all_ranks_end_equal(world: Team) -> None:
    job = tiny.job(groups=world.size, model={"name": "tiny:normed"}, large_batch={"epochs": 1})
    with grid(world, world.size) as ranks:
        models = run(job, ranks)
    groups = world.allgather(models[f"group-{world.rank:03d}"])
    assert all(not torch.equal(a, b) for i, a in enumerate(groups) for b in groups[:i])
    assert all(
        torch.equal(models["batchnorm"], other) for other in world.allgather(models["batchnorm"])
    )


def test_the_average_is_the_mean_of_the_groups(world: Team) -> None:
    job = tiny.job(groups=2 * world.size)
    with grid(world, 2 * world.size) as ranks:
        models = run(job, ranks)
    groups = [
        w
        for part in world.allgather({k: w for k, w in models.items() if k.startswith("group-")})
        for w in part.values()
    ]
    assert len(groups) == 2 * world.size
    assert torch.equal(models["average"], torch.stack(groups).mean(0).float().double())


def test_equal_seeds_make_averaging_a_no_op(world: Team) -> None:
    job = tiny.job(groups=world.size)
    with grid(world, world.size) as ranks:
        models = run(job, replace(ranks, groups=(0,)))
    assert torch.equal(models["average"], models["group-000"])


def test_no_refinement_leaves_phase_1s_weights(world: Team) -> None:
    job = tiny.job(groups=world.size, refine={"epochs": 0})
    model = tiny.model(job)
    with grid(world, world.size) as ranks:
        *_, last = swap(model, job, ranks)
    assert isinstance(last, LargeBatchEnded) and last.model is model


@pytest.mark.ranks(1, 2, 4)
def test_four_groups_are_the_same_to_the_bit_on_any_number_of_ranks(world: Team) -> None:
    job = tiny.job(groups=4, **REFINE_ONLY)
    with grid(world, 4) as ranks:
        here = run(job, ranks)
    with alone(4) as one:
        there = run(job, one)
    for name, weights in here.items():
        if name == "batchnorm":  # sums of other parts in another order
            torch.testing.assert_close(weights, there[name], rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(weights, there[name]), name


@pytest.mark.parametrize("groups", [1, 2])
def test_several_ranks_per_group_give_what_one_gives(world: Team, groups: int) -> None:
    if world.size % groups:
        pytest.skip(f"{world.size} ranks are no multiple of {groups} groups")
    job = tiny.job(
        groups=groups,
        large_batch={"epochs": 0},
        model={"weights": "given"},
        refine={"epochs": 2, "batch_size": 24},
    )
    with grid(world, groups) as ranks:
        here = run(job, ranks)
    with alone(groups) as one:
        there = run(job, one)
    for name, weights in here.items():
        torch.testing.assert_close(weights, there[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.ranks(8)
def test_four_groups_of_two(world: Team) -> None:
    job = tiny.job(
        groups=4, large_batch={"epochs": 0}, model={"weights": "given"}, refine={"batch_size": 24}
    )
    with grid(world, 4) as ranks:
        here = run(job, ranks)
    with alone(4) as one:
        there = run(job, one)
    torch.testing.assert_close(here["average"], there["average"], rtol=1e-4, atol=1e-6)
    assert len(set(world.allgather(here["average"].numpy().tobytes()))) == 1


def test_cycles_enter_the_average_one_by_one(world: Team) -> None:
    """G groups of C cycles give the mean of all G x C weights.

    Each cycle continues from the end of the one before.
    """
    ends: list[Tensor] = []
    for cycles in (1, 2, 3):  # a run of c cycles ends where cycle c of a longer one ends
        job = tiny.job(
            groups=world.size,
            refine={"cycles": cycles, "learning_rate": [[0, 0.05], [1, 0.01]]},
            large_batch={"epochs": 1},
        )
        with grid(world, world.size) as ranks:
            models = run(job, ranks)
        ends.append(models[f"group-{world.rank:03d}"])
    everyones = torch.stack([w for part in world.allgather(ends) for w in part])
    torch.testing.assert_close(models["average"], everyones.mean(0), rtol=1e-6, atol=1e-8)


def test_the_hash_sees_every_bit(world: Team) -> None:
    model = tiny.model(tiny.job())
    before = weights_sha256(model)
    assert set(world.allgather(before)) == {before}
    with torch.no_grad():
        p = next(model.parameters())
        p.view(-1)[0] = torch.nextafter(p.view(-1)[0], torch.tensor(9.0))
    assert weights_sha256(model) != before
