"""`Team`: a communicator, and the collectives that the package needs."""

import time
import traceback
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from mpi4py import MPI

from swap_hpc.errors import RunError, UserError, explained

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
                first.reported_elsewhere = rank != self.rank
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
