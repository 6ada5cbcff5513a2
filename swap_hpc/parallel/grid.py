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

from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import T, Team, nothing


@dataclass(frozen=True)
class Ranks:
    """One rank's place in the grid: its teams, and the groups that it refines.

    Attributes:
        world: all ranks.
        group: the ranks that refine one copy of the model together; this rank alone where there
            are no more ranks than groups.
        peers: the ranks at this rank's place in every group; they average the copies.
        groups: the numbers of the groups that this rank refines, one after the other.
    """

    world: Team
    group: Team
    peers: Team
    groups: tuple[int, ...]

    def free(self) -> None:
        """Free the communicators of the group and the peers. Collective."""
        self.group.free()
        self.peers.free()


@contextmanager
def grid(world: Team, groups: int) -> Iterator[Ranks]:
    """Split `world` into a grid of groups until the context ends. Collective.

    Args:
        world: all ranks.
        groups: the number of copies of the model that are refined. With a multiple of it, several
            ranks refine a copy together; with a divisor, a rank refines several copies, one after
            the other.

    Yields:
        This rank's place in the grid.

    Raises:
        UserError: the number of ranks is neither a multiple nor a divisor of `groups`.
    """
    ranks = _grid(world, groups)
    yield ranks
    # Freeing is collective, so it does not happen after an error, which may be this rank's alone.
    ranks.free()


def _grid(world: Team, groups: int) -> Ranks:
    if world.size % groups == 0:
        per_group = world.size // groups
        row, column = divmod(world.rank, per_group)
        group = world.part(range(row * per_group, (row + 1) * per_group))
        peers = world.part(range(column, world.size, per_group))
        return Ranks(world, group, peers, (row,))
    if groups % world.size == 0:
        per_rank = groups // world.size
        mine = range(world.rank * per_rank, (world.rank + 1) * per_rank)
        return Ranks(world, Team.alone(), world.part(range(world.size)), tuple(mine))
    raise UserError(
        f"{world.size} ranks cannot share {groups} groups: "
        "start a multiple or a divisor of the groups"
    )


@contextmanager
def single_row(world: Team, groups: tuple[int, ...]) -> Iterator[Ranks]:
    """Make all ranks of `world` one group of a grid whose other groups belong to other jobs.

    Args:
        world: all ranks of this job.
        groups: the numbers of the groups that it refines.
    """
    yield Ranks(world, world, Team.alone(), groups)


def of_groups(value: T, ranks: Ranks) -> list[T] | None:
    """Return the `value` of each group's first rank on the world's first; None on others.

    Those ranks are peers, so that the other ranks of the groups send nothing to them. Collective.
    """
    values = ranks.peers.gathered(value if ranks.group.rank == 0 else None)
    return values if ranks.world.rank == 0 else None  # type: ignore[return-value]


@contextmanager
def node_of(world: Team) -> Iterator[Team]:
    """Make a team of the ranks of `world` on this node, until the context ends. Collective.

    A rank's number in it is its local rank. It does not come from launchers, which name their
    variables for it differently, or set none.
    """
    node = world.split_by_node()
    yield node
    node.free()


def first_then_rest(team: Team, function: Callable[[], T]) -> T:
    """Call a function on the first rank, then on one rank of each other node, then on the others.

    Each finds what an earlier call left behind. This is for downloads and caches, on a file system
    that all nodes share or on one that they do not. Collective.

    Returns:
        What the function returned on this rank.
    """
    with node_of(team) as node:
        if team.rank == 0:
            turn = 0
        elif node.rank == 0:
            turn = 1
        else:
            turn = 2
    results = [team.agree(function if turn == now else nothing) for now in range(3)]
    return results[turn]
