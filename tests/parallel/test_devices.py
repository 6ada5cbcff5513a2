"""The GPU that each rank uses: on nodes of unequal size, with one GPU visible or all, or too few.

torch's view of the GPUs is replaced. Nodes are teams of the real world, cut into two unequal parts.
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


def node_number(world: Team) -> int:
    """Return 0, or 1 on the last of several ranks, which is alone on the second node."""
    return int(0 < world.rank == world.size - 1)


@contextmanager
def node(world: Team) -> Iterator[Team]:
    team = world.split(node_number(world))
    yield team
    team.free()


def show_gpus(monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
    """Let torch see GPUs with these UUIDs."""

    def properties(index: int) -> SimpleNamespace:
        return SimpleNamespace(uuid=uuids[index], name="H100", major=9, minor=0)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])


def chosen(world: Team, own: Team) -> tuple[list[tuple[int | None, str | None]], bool]:
    """Return each rank's index and UUID of its GPU, and whether two ranks share one."""
    device = choose_device(own, "auto")
    return world.allgather((device.torch.index, device.uuid)), device.is_shared(world)


def test_all_gpus_visible(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    with node(world) as own:
        show_gpus(monkeypatch, *(f"{node_number(world)}-{gpu}" for gpu in range(8)))
        places, shared = chosen(world, own)
    on_first = world.size - 1 or 1
    on_second = [(0, "1-0")] if world.size > 1 else []
    assert places == [(rank, f"0-{rank}") for rank in range(on_first)] + on_second
    assert not shared


def test_each_ranks_own_gpu_visible(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    with node(world) as own:
        show_gpus(monkeypatch, f"GPU of {world.rank}")
        places, shared = chosen(world, own)
    assert places == [(0, f"GPU of {rank}") for rank in range(world.size)]
    assert not shared


def test_more_ranks_than_gpus(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks know it, even one with a GPU to itself: gradients then go through host memory."""
    with node(world) as own:
        show_gpus(monkeypatch, f"{node_number(world)}-0")
        places, shared = chosen(world, own)
    assert all(index == 0 for index, _ in places)
    assert shared == (world.size > 2)


def test_a_chosen_gpu_is_torchs_current_one_on_each_rank(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise ranks of benches and of library calls would all wait for the first GPU."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    show_gpus(monkeypatch, *(f"{gpu}" for gpu in range(8)))
    device = use_device(world, world, "auto")
    assert current == [device.torch] == [torch.device("cuda", world.rank)]
    assert ddp_backend(device, world) == "nccl"


def test_benches_of_ranks_that_share_a_gpu_send_through_the_host(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL would end with "Duplicate GPU detected"."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    show_gpus(monkeypatch, "the only one")
    device = use_device(world, world, "auto")
    assert ddp_backend(device, world) == ("gloo" if world.size > 1 else "nccl")
    assert ddp_backend(Device(torch.device("cpu"), 1), world) == "gloo"


@pytest.mark.ranks(2, 3)
def test_some_ranks_with_a_gpu_and_some_without_are_refused(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_gpus(monkeypatch, *(["one"] if world.rank == 0 else []))
    message = (
        "rank 1 sees no GPU, others do: ask the launcher for a GPU per rank, or --set device=cpu"
    )
    with pytest.raises(UserError, match=message):
        use_device(world, world, "auto")


@pytest.mark.ranks(2, 3)
def test_one_gpu_that_torch_cannot_use_is_an_error_on_all_ranks(
    world: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_gpus(monkeypatch, "one", "two", "three")
    if world.rank == 1:
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    message = (
        r"H100 has compute capability 9\.0, "
        r"which torch .* is not built for \(sm_75 sm_80\)"
    )
    with pytest.raises(UserError, match=message):
        use_device(world, world, "auto")


def test_no_gpu(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpus(monkeypatch)
    assert choose_device(world, "auto").torch.type == "cpu"
    with pytest.raises(UserError, match='device = "cuda", but torch sees no GPU on this host'):
        choose_device(world, "cuda")
    assert not Device(torch.device("cpu"), 1).is_shared(world)
