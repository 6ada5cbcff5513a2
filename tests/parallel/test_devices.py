"""Which GPU each rank takes: on nodes of unequal size, with one GPU shown or all, with more ranks than GPUs.

torch's view of the GPUs is replaced; nodes are teams of the real world, cut in two unequal parts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from swap_hpc.devices import Device, choose_device
from swap_hpc.errors import UserError
from swap_hpc.ranks import Team


@contextmanager
def node(world: Team) -> Iterator[Team]:
    """The last rank is alone on the second node."""
    cut = Team(world.comm.Split(int(0 < world.rank == world.size - 1), world.rank))
    yield cut
    cut.free()


def shows(monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))


def chosen(world: Team, own: Team) -> tuple[list[tuple[int | None, str | None]], bool]:
    device = choose_device(own, "auto")
    return world.allgather((device.torch.index, device.uuid)), device.is_shared(world)


def test_all_gpus_shown(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    with node(world) as own:
        where = int(0 < world.rank == world.size - 1)
        shows(monkeypatch, *(f"{where}-{gpu}" for gpu in range(8)))
        places, shared = chosen(world, own)
    first = world.size - 1 or 1
    assert places == [(r, f"0-{r}") for r in range(first)] + [(0, "1-0")] * (world.size > 1) and not shared


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


def test_a_gpu_that_is_not_there(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    shows(monkeypatch)
    assert choose_device(world, "auto").torch.type == "cpu"
    with pytest.raises(UserError, match='device = "cuda", but torch sees no GPU on this host'):
        choose_device(world, "cuda")
    assert not Device(torch.device("cpu"), 1).is_shared(world)
