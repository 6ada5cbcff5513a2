"""Ranks whose weights drift apart, because their gradients were not averaged, end with one line."""

import re

import horovod.torch as hvd
import pytest
import tiny
import torch
from torch import nn

from swap_hpc.average.agreement import check_agreement
from swap_hpc.errors import RunError
from swap_hpc.parallel.grid import grid
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import PHASE_1
from swap_hpc.run import doctor
from swap_hpc.swap import swap
from swap_hpc.train.events import Event, LargeBatchEnded, SavePoint
from swap_hpc.train.fit import fit


@pytest.fixture
def unaveraged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank keeps its own gradients."""
    monkeypatch.setattr(hvd, "grouped_allreduce_async_", lambda tensors, **how: "a handle")
    monkeypatch.setattr(hvd, "synchronize", lambda handle: None)


def test_equal_weights_agree_and_others_do_not(world: Team) -> None:
    model = nn.Linear(5, 4)
    torch.nn.init.constant_(model.weight, 0.5)
    torch.nn.init.zeros_(model.bias)
    check_agreement(model, world, "here")
    with torch.no_grad():
        model.weight[3, 4] += 2**-24 * (world.rank == world.size - 1)  # the last bit of one element
    if world.size == 1:
        check_agreement(model, world, "here")
        return
    with pytest.raises(
        RunError,
        match=rf"the weights of rank {world.size - 1} differ from those of rank 0 after here: .*swap-hpc doctor",
    ):
        check_agreement(model, world, "here")


@pytest.mark.ranks(2, 4)
def test_one_small_collective_tells_that_all_agree(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, plain = [], Team.maximum

    def counted(team: Team, *values: float) -> list[float]:
        calls.append(len(values))
        return plain(team, *values)

    monkeypatch.setattr(Team, "maximum", counted)
    monkeypatch.setattr(Team, "allgather", lambda self, value: pytest.fail("grows with the ranks"))
    model = tiny.model(tiny.job())
    check_agreement(model, world, "here")
    assert calls == [4]


@pytest.mark.ranks(2, 4)
def test_phase_1_ends_with_a_line(world: Team, unaveraged: None) -> None:
    job = tiny.job(checkpoint={"epochs": 0})
    with pytest.raises(
        RunError,
        match=r"the weights of rank 1 differ from those of rank 0 after large_batch, epoch 3, step 0",
    ):
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
    with grid(world, 2) as ranks:
        events = swap(tiny.model(job), job, ranks)
        for event in events:
            if isinstance(event, LargeBatchEnded):
                monkeypatch.setattr(
                    hvd, "grouped_allreduce_async_", lambda tensors, **how: "a handle"
                )
                monkeypatch.setattr(hvd, "synchronize", lambda handle: None)
                break
        with pytest.raises(
            RunError,
            match="the weights of rank 1 differ from those of rank 0 after refine of group",
        ):
            list(events)
    monkeypatch.undo()
    # a program that goes on after the error trains right on all ranks, not on the group that Horovod was started for
    list(fit(tiny.model(job), job, PHASE_1, world))


@pytest.mark.ranks(1, 2)
def test_a_right_run_is_told_nothing(world: Team) -> None:
    job = tiny.job()
    list(fit(tiny.model(job), job, PHASE_1, world))


@pytest.mark.ranks(1, 2, 3)
def test_doctor_tries_a_step(world: Team) -> None:
    lines = doctor.report(world, 1)
    assert ("a step's gradients, averaged by Horovod over world: right on all ranks" in lines) == (
        world.size > 1
    )
    assert lines[-1] == "no problem found"


@pytest.mark.ranks(2, 3)
def test_doctor_tells_that_a_step_averages_nothing(world: Team, unaveraged: None) -> None:
    ranks = "0, 1" if world.size == 2 else "0, 2"  # rank 1 of 3 has the mean by chance
    says = f"PROBLEM: gradients are not averaged on the devices of ranks {ranks}: a fault of Horovod, NCCL or the network"
    assert any(line.startswith(says) for line in doctor.report(world, 1))


@pytest.mark.ranks(1, 2)
def test_doctor_goes_on_where_torch_cannot_use_the_gpu(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_old(index: int) -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver"
        )

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", too_old)
    lines = doctor.report(world, 1)
    problems = [line for line in lines if line.startswith("PROBLEM: ")]
    assert len(problems) == 1 and re.search(
        "is too old for CUDA 1[23], which needs (525|580) or newer", problems[0]
    ), problems
    assert any(line.startswith("rank 0 -> ") for line in lines)
