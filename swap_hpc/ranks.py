"""Ranks form a grid, each phase uses one communicator. The only module that imports mpi4py.

```
              peers 0  peers 1
   group 0       0        1        large batch: world
   group 1       2        3        refine:      group (a row)
   group 2       4        5        average:     peers (a column)
```
"""

import os
import re
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

# Read when MPI starts. A rank, or Horovod's thread, that waits for others gives its core away instead of turning in circles on it: it may
# share it with the model, or with another rank. On cores of its own it costs nothing. (Open MPI's name; other libraries know none such.)
os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")

from mpi4py import MPI

from swap_hpc.errors import RunError, UserError, explained
from swap_hpc.launcher import advice, launched

T = TypeVar("T")


class Team:
    """A communicator and the few collectives that the package needs. A team of one makes no MPI call."""

    def __init__(self, comm: MPI.Comm):
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    @classmethod
    def world(cls) -> "Team":
        return cls(MPI.COMM_WORLD)

    @classmethod
    def alone(cls) -> "Team":
        return cls(MPI.COMM_SELF)

    def sum_(self, array: np.ndarray) -> np.ndarray:
        """Replaces `array` (float64 or int64, C-contiguous) by its sum over the team."""
        assert array.dtype in (np.float64, np.int64) and array.flags.c_contiguous
        if self.size > 1:
            self.comm.Allreduce(MPI.IN_PLACE, array, op=MPI.SUM)
        return array

    def sums(self, *values: float) -> list[float]:
        """Each value's sum over the team, in float64."""
        return self.sum_(np.array(values, dtype=np.float64)).tolist()

    def maximum(self, *values: float) -> list[float]:
        """Each value's maximum over the team."""
        array = np.array(values, dtype=np.float64)
        if self.size > 1:
            self.comm.Allreduce(MPI.IN_PLACE, array, op=MPI.MAX)
        return array.tolist()

    def any(self, flag: bool) -> bool:
        return self.maximum(float(flag))[0] > 0

    def broadcast(self, value: T) -> T:
        """The first rank's `value`, a small Python object."""
        return self.comm.bcast(value) if self.size > 1 else value

    def broadcast_(self, array: np.ndarray) -> np.ndarray:
        """Replaces `array` (uint8, contiguous) by the first rank's."""
        if self.size > 1:
            for start in range(0, array.size, 1 << 26):  # MPI counts in 32 bits; 64 MiB at a time
                self.comm.Bcast(array[start : start + (1 << 26)])
        return array

    def allgather(self, value: T) -> list[T]:
        """Every rank's `value`, a small Python object, in the order of the ranks."""
        return self.comm.allgather(value) if self.size > 1 else [value]

    def gather(self, array: np.ndarray) -> np.ndarray | None:
        """Every rank's `array`, (n,) uint8 of one length, as (ranks, n) on the first rank; None on the others."""
        if self.size == 1:
            return array[None]
        rows = np.empty((self.size, len(array)), np.uint8) if self.rank == 0 else None
        self.comm.Gather(array, rows)
        return rows

    def first(self, function: Callable[[], T]) -> T | None:
        """`function()` on the first rank alone, None on the others; where it raises there, all raise."""
        nothing: Callable[[], T | None] = lambda: None  # noqa: E731
        return self.agree(function if self.rank == 0 else nothing)

    def barrier(self) -> None:
        if self.size > 1:
            self.comm.Barrier()

    def agree(self, function: Callable[[], T]) -> T:
        """`function()`, run on every rank; where it raises on any, the first such rank's error is raised on all.

        `function` must not communicate over the team.
        """
        if self.size == 1:
            return function()
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        for rank, first in enumerate(self.allgather(_portable(error))):
            if first is not None:
                first.said_elsewhere = rank != self.rank
                raise first from None
        return result  # type: ignore[return-value]

    def first_while_others_sleep(self, function: Callable[[], T]) -> T:
        """`function()` on the first rank, its result on all; the others give their cores away meanwhile."""
        result = function() if self.rank == 0 else None
        request = self.comm.Ibarrier()
        while not request.Test():
            time.sleep(0.02)
        return self.broadcast(result)  # type: ignore[return-value]

    def free(self) -> None:
        if self.comm not in (MPI.COMM_WORLD, MPI.COMM_SELF):
            self.comm.Free()


def _portable(error: Exception | None) -> UserError | RunError | None:
    """An error that another rank can raise too, with its traceback as its message where it is an unexpected one."""
    error = explained(error) if error else None
    if error is None or isinstance(error, UserError | RunError):
        return error
    return RunError("".join(traceback.format_exception(error)))


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
    raise UserError(f"{world.size} ranks cannot share {groups} groups: start a multiple or a divisor of the groups")


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


def abort(code: int) -> None:
    """Ends every rank of the job, at once."""
    MPI.COMM_WORLD.Abort(code)


def launcher_mismatch(world: Team) -> str | None:
    """One line where the launcher started more ranks than MPI sees, else None."""
    told = launched()
    if told is None or told.size == world.size:
        return None
    return (
        f"{told.by} started {told.size} ranks, but MPI sees a world of {world.size}: launcher and MPI library do not match; "
        f"use the mpirun that belongs to {mpi_library()} "
        f"(with srun: {advice(mpi_library()).srun}, or the type that this library was built for)"
    )


def mpi_library() -> str:
    """The MPI library in one line, for example "Open MPI v5.0.11" or "MPICH 4.0.2"."""
    first = MPI.Get_library_version().partition(",")[0].partition("\n")[0].strip("\0 ")
    return re.sub(r" Version:\s*", " ", first)  # MPICH's "MPICH Version:      4.0.2"


def mpi_library_file() -> str | None:
    """The file of the MPI library that this process loaded: in a container it shows whose MPI it is. None where the system does not say."""
    with suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        return next((line.split(maxsplit=5)[5].strip() for line in maps if re.search(r"/libmpi\.so|/libmpich\.so", line)), None)
    return None


def handle_address(team: Team) -> int:
    """Where the communicator's handle lies, for calls into the MPI library that mpi4py does not have."""
    return MPI._addressof(team.comm)


def thread_level() -> str:
    """The thread support that MPI was initialised with. Horovod and mpi4py side by side want "multiple"."""
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    return levels[MPI.Query_thread()]


def host() -> str:
    return MPI.Get_processor_name()
