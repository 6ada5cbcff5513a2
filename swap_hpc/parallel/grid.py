"""Ranks form a grid; each phase uses one of its communicators.

```
              peers 0  peers 1
   group 0       0        1        phase 1, large batch: world
   group 1       2        3        phase 2, refine:      group (a row)
   group 2       4        5        phase 3, average:     peers (a column)
```
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mpi4py import MPI

from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import T, Team


@dataclass(frozen=True)
class Ranks:
    """One rank's place in the grid."""

    world: Team
    group: Team  # the ranks that refine one copy together; one rank where ranks are as many as groups, or fewer
    peers: Team  # the ranks of all groups that have this rank's place in theirs
    groups: tuple[int, ...]  # the groups that this rank refines, one after the other

    def free(self) -> None:
        self.group.free()
        self.peers.free()


@contextmanager
def grid(world: Team, groups: int) -> Iterator[Ranks]:
    """The grid of `groups` over `world`, freed at the end.

    The number of ranks is a multiple of `groups` (several ranks refine a copy together) or a divisor (a rank refines
    several copies, one after the other). Raises UserError where it is neither.
    """
    ranks = _grid(world, groups)
    yield ranks
    ranks.free()  # collective: not on the way out of an error that the other ranks may not have


def _grid(world: Team, groups: int) -> Ranks:
    if world.size % groups == 0:
        per_group = world.size // groups
        row, column = divmod(world.rank, per_group)
        # Split is collective over the world: a rank in a group of its own must call it too
        return Ranks(world, _split(world, row), _split(world, column), (row,))
    if groups % world.size == 0:
        per_rank = groups // world.size
        mine = range(world.rank * per_rank, (world.rank + 1) * per_rank)
        return Ranks(world, Team.alone(), _split(world, 0), tuple(mine))
    raise UserError(
        f"{world.size} ranks cannot share {groups} groups: start a multiple or a divisor of the groups"
    )


@contextmanager
def single_row(world: Team, groups: tuple[int, ...]) -> Iterator[Ranks]:
    """All ranks of `world` as one group that refines `groups`, of a grid whose other groups are other jobs'."""
    yield Ranks(world, world, Team.alone(), groups)


def _split(team: Team, colour: int) -> Team:
    return Team(team.comm.Split(colour, team.rank))


@contextmanager
def node_of(world: Team) -> Iterator[Team]:
    """The ranks of `world` on this node; the rank in it is the local rank. From MPI, not from a launcher's environment."""
    node = Team(world.comm.Split_type(MPI.COMM_TYPE_SHARED, world.rank))
    yield node
    node.free()


def first_then_rest(team: Team, function: Callable[[], T]) -> T:
    """`function()` on the team's first rank, then on one of each node, then on all others: each finds what was left.

    For downloads and caches, on a file system that all nodes share or one that they do not.
    """
    with node_of(team) as node:
        turn = 0 if team.rank == 0 else 1 if node.rank == 0 else 2
    nothing: Callable[[], Any] = lambda: None  # noqa: E731
    results = [team.agree(function if turn == now else nothing) for now in range(3)]
    return results[turn]
