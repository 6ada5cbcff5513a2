"""Which GPU each rank takes: on nodes of unequal size, with one GPU shown or all, with more ranks than GPUs.

torch's view of the GPUs is replaced; nodes are teams of the real world, cut in two unequal parts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from swap_hpc.bench.training import ddp_backend
from swap_hpc.errors import UserError
from swap_hpc.parallel.devices import Device, choose_device, use_device
from swap_hpc.parallel.teams import Team


@contextmanager
def node(world: Team) -> Iterator[Team]:
    """The last rank is alone on the second node."""
    cut = Team(world.comm.Split(int(0 < world.rank == world.size - 1), world.rank))
    yield cut
    cut.free()


def shows(monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    properties = {"name": "H100", "major": 9, "minor": 0}
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda index: SimpleNamespace(uuid=uuids[index], **properties),
    )
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])


def chosen(world: Team, own: Team) -> tuple[list[tuple[int | None, str | None]], bool]:
    device = choose_device(own, "auto")
    return world.allgather((device.torch.index, device.uuid)), device.is_shared(world)


def test_all_gpus_shown(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    with node(world) as own:
        where = int(0 < world.rank == world.size - 1)
        shows(monkeypatch, *(f"{where}-{gpu}" for gpu in range(8)))
        places, shared = chosen(world, own)
    first = world.size - 1 or 1
    assert (
        places == [(r, f"0-{r}") for r in range(first)] + [(0, "1-0")] * (world.size > 1)
        and not shared
    )


def test_each_rank_shown_its_own(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    with node(world) as own:
        shows(monkeypatch, f"GPU of {world.rank}")
        places, shared = chosen(world, own)
    assert places == [(0, f"GPU of {rank}") for rank in range(world.size)] and not shared


def test_more_ranks_than_gpus(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """All learn of it, also those with a GPU to themselves: gradients then go through host memory."""
    with node(world) as own:
        where = int(0 < world.rank == world.size - 1)
        shows(monkeypatch, f"{where}-0")
        places, shared = chosen(world, own)
    assert all(index == 0 for index, _ in places) and shared == (world.size > 2)


def test_a_chosen_gpu_is_torchs_current_one_on_each_rank(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else ranks of benches and of library calls would wait for, and race on, the first GPU."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    shows(monkeypatch, *(f"{gpu}" for gpu in range(8)))
    device = use_device(world, world, "auto")
    assert current == [device.torch] == [torch.device("cuda", world.rank)]
    assert ddp_backend(device, world) == "nccl"


def test_benches_of_ranks_that_share_a_gpu_send_through_the_host(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL ends with "Duplicate GPU detected" there."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    shows(monkeypatch, "the only one")
    device = use_device(world, world, "auto")
    assert ddp_backend(device, world) == ("gloo" if world.size > 1 else "nccl")
    assert ddp_backend(Device(torch.device("cpu"), 1), world) == "gloo"


@pytest.mark.ranks(2, 3)
def test_some_ranks_with_a_gpu_and_some_without_are_refused(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    shows(monkeypatch, *(["one"] if world.rank == 0 else []))
    with pytest.raises(
        UserError,
        match="rank 1 sees no GPU, others do: ask the launcher for a GPU per rank, or --set device=cpu",
    ):
        use_device(world, world, "auto")


@pytest.mark.ranks(2, 3)
def test_one_gpu_that_torch_cannot_use_is_told_by_all(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    shows(monkeypatch, "one", "two", "three")
    if world.rank == 1:
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    with pytest.raises(
        UserError,
        match=r"H100 has compute capability 9\.0, which torch .* is not built for \(sm_75 sm_80\)",
    ):
        use_device(world, world, "auto")


def test_a_gpu_that_is_not_there(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    shows(monkeypatch)
    assert choose_device(world, "auto").torch.type == "cpu"
    with pytest.raises(UserError, match='device = "cuda", but torch sees no GPU on this host'):
        choose_device(world, "cuda")
    assert not Device(torch.device("cpu"), 1).is_shared(world)
