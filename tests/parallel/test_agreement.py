"""A run whose ranks' weights differ, because gradients are not averaged, ends with one line."""

import re

import horovod.torch as hvd
import pytest
import tiny
import torch
from torch import nn
from unaveraged import REPLACED

from swap_hpc.average.agreement import check_agreement
from swap_hpc.errors import RunError
from swap_hpc.parallel.grid import grid
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1
from swap_hpc.run import doctor
from swap_hpc.swap import swap
from swap_hpc.train.events import Event, LargeBatchEnded, SavePoint
from swap_hpc.train.fit import fit


def average_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each rank keep its own gradients from here on."""
    for name, function in REPLACED.items():
        monkeypatch.setattr(hvd, name, function)


@pytest.fixture
def unaveraged(monkeypatch: pytest.MonkeyPatch) -> None:
    average_nothing(monkeypatch)


def test_equal_weights_agree_and_others_do_not(world: Team) -> None:
    model = nn.Linear(5, 4)
    torch.nn.init.constant_(model.weight, 0.5)
    torch.nn.init.zeros_(model.bias)
    check_agreement(model, world, "here")
    last = world.size - 1
    with torch.no_grad():
        model.weight[3, 4] += 2**-24 * (world.rank == last)  # the last bit of one element
    if world.size == 1:
        check_agreement(model, world, "here")
        return
    message = (
        rf"the weights of rank {last} differ from those of rank 0 after here: .*swap-hpc doctor"
    )
    with pytest.raises(RunError, match=message):
        check_agreement(model, world, "here")


@pytest.mark.ranks(2, 4)
def test_weights_that_agree_cost_one_small_collective(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    maximum = Team.maximum

    def counted(team: Team, *values: float) -> list[float]:
        calls.append(len(values))
        return maximum(team, *values)

    monkeypatch.setattr(Team, "maximum", counted)
    for name in ("allgather", "gathered", "broadcast"):
        monkeypatch.setattr(Team, name, lambda *arguments: pytest.fail("more than a hash is sent"))
    model = tiny.model(tiny.job())
    check_agreement(model, world, "here")
    assert calls == [8]


@pytest.mark.ranks(2, 4)
def test_phase_1_ends_with_a_line(world: Team, unaveraged: None) -> None:
    job = tiny.job(checkpoint={"epochs": 0})
    message = "the weights of rank 1 differ from those of rank 0 after large_batch, epoch 3, step 0"
    with pytest.raises(RunError, match=message):
        list(fit(tiny.model(job), job, PHASE_1, world))


@pytest.mark.ranks(2, 4)
def test_a_save_ends_with_a_line(world: Team, unaveraged: None) -> None:
    job = tiny.job()
    events = fit(tiny.model(job), job, PHASE_1, world)
    seen: list[Event] = []
    with pytest.raises(RunError, match="after large_batch, epoch 2, step 0"):
        seen.extend(events)
    assert not any(isinstance(event, SavePoint) and event.due for event in seen)


@pytest.mark.ranks(4)
def test_a_group_of_several_ranks_ends_with_a_line(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tiny.job(groups=2)
    message = "the weights of rank 1 differ from those of rank 0 after refine of group"
    with grid(world, 2) as ranks:
        events = swap(tiny.model(job), job, ranks)
        for event in events:
            if isinstance(event, LargeBatchEnded):
                average_nothing(monkeypatch)
                break
        with pytest.raises(RunError, match=message):
            list(events)
    monkeypatch.undo()
    # A program that continues after the error trains on all ranks, and not on the group that
    # Horovod was started for.
    list(fit(tiny.model(job), job, PHASE_1, world))


@pytest.mark.ranks(1, 2)
def test_a_sound_run_has_no_error(world: Team) -> None:
    job = tiny.job()
    list(fit(tiny.model(job), job, PHASE_1, world))


@pytest.mark.ranks(1, 2, 3)
def test_doctor_tries_a_step(world: Team) -> None:
    lines = doctor.report(world, 1)
    tried = "a step's gradients, averaged by Horovod over world: right on all ranks"
    assert (tried in lines) == (world.size > 1)
    assert lines[-1] == "no problem found"


@pytest.mark.ranks(2, 3)
def test_doctor_finds_that_a_step_averages_nothing(world: Team, unaveraged: None) -> None:
    ranks = "0, 1" if world.size == 2 else "0, 2"  # rank 1 of 3 has the mean by chance
    problem = (
        f"PROBLEM: gradients are not averaged on the devices of ranks {ranks}: "
        "a fault of Horovod, NCCL or the network"
    )
    assert any(line.startswith(problem) for line in doctor.report(world, 1))


@pytest.mark.ranks(1, 2)
def test_doctor_continues_if_torch_cannot_use_the_gpu(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_old(index: int) -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12020). "
            "Please update your GPU driver"
        )

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", too_old)
    lines = doctor.report(world, 1)
    problems = [line for line in lines if line.startswith("PROBLEM: ")]
    assert len(problems) == 1, problems
    assert re.search("is too old for CUDA 1[23], which needs (525|580) or newer", problems[0])
    places = [line.partition(" -> ")[0] for line in lines if line.startswith("rank ")]
    # the first rank prints, and it alone knows where the others are
    assert places == ([f"rank {rank}" for rank in range(world.size)] if world.rank == 0 else [])
