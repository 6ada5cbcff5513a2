"""`Team`: a communicator, and the collectives that the package needs."""

import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from swap_hpc.errors import RunError, UserError, explained

T = TypeVar("T")

# MPI counts elements in 32 bits, and a library may copy a message: larger ones are cut.
BROADCAST_BYTES = 2**26


def nothing() -> Any:
    """Return None: the part of a rank that only takes part in `Team.agree`."""
    return None


class Team:
    """A communicator, and the few collectives that the package needs.

    Every method but `alone` and `world` is collective: all ranks of the team must call it, in the
    same order. In a team of one, no method but `free` makes an MPI call.

    Args:
        comm: any intracommunicator of mpi4py.

    Attributes:
        comm: the communicator.
        rank: this process's rank in it, from 0.
        size: the number of its ranks.
    """

    def __init__(self, comm: MPI.Comm):
        self.comm = comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    @classmethod
    def world(cls) -> "Team":
        """Return the team of all ranks of the job."""
        return cls(MPI.COMM_WORLD)

    @classmethod
    def alone(cls) -> "Team":
        """Return the team of this rank alone."""
        return cls(MPI.COMM_SELF)

    def sum_(self, array: np.ndarray) -> np.ndarray:
        """Replace a C-contiguous float64 or int64 array by its sum over the team, and return it."""
        assert array.dtype in (np.float64, np.int64) and array.flags.c_contiguous
        if self.size > 1:
            self.comm.Allreduce(MPI.IN_PLACE, array, op=MPI.SUM)
        return array

    def sums(self, *values: float) -> list[float]:
        """Return each value's sum over the team, in float64."""
        return self.sum_(np.array(values, dtype=np.float64)).tolist()

    def maximum(self, *values: float) -> list[float]:
        """Return each value's maximum over the team, in float64."""
        array = np.array(values, dtype=np.float64)
        if self.size > 1:
            self.comm.Allreduce(MPI.IN_PLACE, array, op=MPI.MAX)
        return array.tolist()

    def any(self, flag: bool) -> bool:
        """Tell whether `flag` is true on a rank of the team."""
        return self.maximum(float(flag))[0] > 0

    def broadcast(self, value: T) -> T:
        """Return the first rank's `value`, a small Python object."""
        return self.comm.bcast(value) if self.size > 1 else value

    def broadcast_(self, array: np.ndarray) -> np.ndarray:
        """Replace a contiguous uint8 array by the first rank's, and return it."""
        if self.size > 1:
            for start in range(0, array.size, BROADCAST_BYTES):
                self.comm.Bcast(array[start : start + BROADCAST_BYTES])
        return array

    def allgather(self, value: T) -> list[T]:
        """Return every rank's `value`, a small Python object, in the order of the ranks."""
        return self.comm.allgather(value) if self.size > 1 else [value]

    def gather(self, array: np.ndarray) -> np.ndarray | None:
        """Return the ranks' arrays, (n,) uint8, as (ranks, n) on the first rank; None on others."""
        if self.size == 1:
            return array[None]
        rows = np.empty((self.size, len(array)), np.uint8) if self.rank == 0 else None
        self.comm.Gather(array, rows)
        return rows

    def first(self, function: Callable[[], T]) -> T | None:
        """Return `function()`, called on the first rank alone, and None on the others.

        An error that it raises is raised on all ranks.
        """
        return self.agree(function if self.rank == 0 else nothing)

    def barrier(self) -> None:
        """Wait until all ranks of the team are here."""
        if self.size > 1:
            self.comm.Barrier()

    def agree(self, function: Callable[[], T]) -> T:
        """Return `function()`, called on every rank; an error on one rank is raised on all.

        So no rank waits forever for one that failed. Of several errors, that of the first rank to
        have one is raised. `function` must not communicate over the team.
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
        """Return `function()`, called on the first rank alone, on all ranks.

        The other ranks give their cores away meanwhile, to a function that uses many threads. An
        error of `function` is raised on the first rank alone, and the others wait until the job is
        ended.
        """
        if self.size == 1:
            return function()
        result = function() if self.rank == 0 else None
        request = self.comm.Ibarrier()
        while not request.Test():
            time.sleep(0.02)
        return self.broadcast(result)  # type: ignore[return-value]

    def free(self) -> None:
        """Free the communicator, unless it is MPI's own."""
        if self.comm not in (MPI.COMM_WORLD, MPI.COMM_SELF):
            self.comm.Free()


def _portable(error: Exception | None) -> UserError | RunError | None:
    """Return an error that another rank can raise, too; the traceback of an unexpected one is text.

    Other exceptions may not survive pickling, which sends them.
    """
    error = explained(error) if error else None
    if error is None or isinstance(error, UserError | RunError):
        return error
    return RunError("".join(traceback.format_exception(error)))
