"""The grid of ranks, and a team's collectives."""

import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from torch import distributed

from swap_hpc.errors import UserError
from swap_hpc.parallel.grid import first_then_rest, grid, node_of
from swap_hpc.parallel.horovod import horovod_session
from swap_hpc.parallel.teams import Team

pytestmark = pytest.mark.process_groups(1, 2, 4)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 8, 12])
def test_the_grid_covers_every_group_once(world: Team, groups: int) -> None:
    if world.size % groups and groups % world.size:
        with pytest.raises(UserError, match="multiple or a divisor"), grid(world, groups):
            pass
        return
    with grid(world, groups) as ranks:
        rows = world.allgather((ranks.groups, ranks.group.size, ranks.group.rank, ranks.peers.size))
    led = [g for mine, _, rank_in_group, _ in rows for g in mine if rank_in_group == 0]
    assert sorted(led) == list(range(groups))
    assert all(size == max(1, world.size // groups) for _, size, _, _ in rows)
    assert all(peers * size == world.size for _, size, _, peers in rows)


@pytest.mark.ranks(4)
@pytest.mark.process_groups(4)
def test_the_grid_is_that_of_the_guide(world: Team) -> None:
    guide = (Path(__file__).parents[2] / "swap_hpc" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| ([\d, ]+) \| ([\d, ]+) \| ([\d, ]+) \|$", guide, re.MULTILINE)
    with grid(world, 2) as ranks:
        mine = (ranks.groups, *(team.allgather(world.rank) for team in (ranks.group, ranks.peers)))
    assert rows[world.rank] == (str(world.rank), *(", ".join(map(str, each)) for each in mine))


def test_an_error_on_one_rank_is_raised_on_all(world: Team) -> None:
    def fails_on_the_last() -> None:
        if world.rank == world.size - 1:
            raise UserError("the last rank says no")

    with pytest.raises(UserError, match="the last rank says no") as error:
        world.agree(fails_on_the_last)
    assert error.value.reported_elsewhere == (world.rank < world.size - 1)
    world.barrier()  # no rank is left behind in a collective


def test_of_several_errors_the_first_ranks_is_raised(world: Team) -> None:
    def fails_on_all_but_the_first() -> None:
        if world.rank or world.size == 1:
            raise UserError(f"rank {world.rank} says no")

    rank = min(1, world.size - 1)
    with pytest.raises(UserError, match=f"rank {rank} says no") as error:
        world.agree(fails_on_all_but_the_first)
    assert error.value.reported_elsewhere == (world.rank != rank)


def test_ranks_agree_by_a_number(world: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no rank fails, and where all hold the same, no object is sent to anybody."""
    for name in ("allgather", "gathered", "broadcast"):
        monkeypatch.setattr(Team, name, lambda *arguments: pytest.fail("grows with the ranks"))
    assert world.agree(lambda: world.rank) == world.rank
    assert world.first(lambda: "first") == (None if world.rank else "first")
    assert world.first_unlike(b"what all hold" * 10**6) is None


def test_the_first_rank_that_differs_is_found(world: Team) -> None:
    n = world.size
    assert world.first_where(False) is None
    assert world.first_where(world.rank >= n - 2) == max(0, n - 2)
    assert world.first_unlike(b"") is None
    for other in range(1, n):
        assert world.first_unlike(b"other" if world.rank >= other else b"") == other
    assert world.broadcast(world.rank, n - 1) == n - 1


def test_objects_go_to_and_come_from_the_first_rank(world: Team) -> None:
    values = [(rank, rank * "long") for rank in range(world.size)]
    assert world.gathered(values[world.rank]) == (None if world.rank else values)
    assert world.scattered(None if world.rank else values) == values[world.rank]
    rows = np.arange(3 * world.size, dtype=np.uint8).reshape(world.size, 3)
    row = world.scatter(None if world.rank else rows)
    assert row.tolist() == rows[world.rank].tolist()


def test_parts_of_a_team_are_made_by_a_rule(world: Team) -> None:
    odd = range(world.rank % 2, world.size, 2)
    part = world.part(odd)
    assert (part.rank, part.size) == (world.rank // 2, len(odd))
    assert part.sums(world.rank) == [sum(odd)]
    again = part.part(range(part.size))
    assert again.allgather(world.rank) == [*odd]
    again.free()
    part.free()


def test_collectives_return_what_their_names_say(world: Team) -> None:
    n = world.size
    assert world.sums(1.0, world.rank) == [n, n * (n - 1) / 2]
    assert world.maximum(world.rank) == [n - 1]
    assert world.any(world.rank == n - 1) and not world.any(False)
    assert world.broadcast(f"from {world.rank}") == "from 0"
    assert (world.broadcast_(np.full(5, world.rank, np.uint8)) == 0).all()
    values = [rank * "long" for rank in range(n)]
    assert world.allgather(world.rank * "long") == values
    rows = world.gather(np.full(3, world.rank, np.uint8))
    assert (rows is None) == (world.rank > 0)
    if rows is not None:
        assert rows.tolist() == [3 * [rank] for rank in range(n)]
    assert world.sum_(np.array([2**53, 1])).tolist() == [n * 2**53, n]
    assert world.first_while_others_sleep(lambda: world.rank) == 0


def test_the_first_rank_goes_first(world: Team, tmp_path_factory: pytest.TempPathFactory) -> None:
    marker = world.broadcast(tmp_path_factory.mktemp("shared") / "made-by-one")

    def make_or_find() -> str:
        if marker.exists():
            return "found"
        marker.touch()
        return "made"

    results = world.allgather(first_then_rest(world, make_or_find))
    assert results == ["made"] + ["found"] * (world.size - 1)


def test_local_ranks_are_distinct(world: Team) -> None:
    with node_of(world) as node:
        assert sorted(node.allgather(node.rank)) == list(range(node.size))


def test_teams_of_teams(world: Team) -> None:
    """A part is split again, while the other parts do something else."""
    half = world.split(world.rank % 2)
    assert half.allgather(world.rank) == list(range(world.rank % 2, world.size, 2))
    if world.rank % 2:
        pair = half.split(half.rank // 2)
        assert pair.sums(1.0) == [pair.size]
        pair.free()
    half.free()
    world.barrier()


def test_a_world_is_the_same_ranks_whenever_it_is_asked_for(world: Team) -> None:
    if world.rank == 0:
        assert (Team.world().rank, Team.world().size) == (0, world.size)
    world.barrier()


@pytest.mark.ranks()
@pytest.mark.process_groups(2, 4)
def test_a_process_group_of_torchs_is_a_team(world: Team) -> None:
    """Several ranks of a group may train by DistributedDataParallel: it needs a process group."""
    with grid(world, 2) as ranks:
        row, _ = distributed.new_subgroups(ranks.group.size)
        team = Team(row)
        assert (team.rank, team.size) == (ranks.group.rank, ranks.group.size)
        assert (
            team.comm is row and ranks.group.comm is None and world.comm is distributed.group.WORLD
        )
        assert team.allgather(world.rank) == ranks.group.allgather(world.rank)


@pytest.mark.ranks()
@pytest.mark.process_groups(2)
def test_horovod_is_refused_where_torch_connects_the_ranks(world: Team) -> None:
    with (
        pytest.raises(UserError, match="needs MPI, and torch.distributed connects these"),
        horovod_session(world, tiny.CPU),
    ):
        pass
