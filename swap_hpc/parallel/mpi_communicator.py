"""Ranks that MPI connects."""

import time
from typing import Any

import numpy as np
from mpi4py import MPI

from swap_hpc.parallel.communicator import Communicator


class MpiCommunicator(Communicator):
    """A communicator of mpi4py.

    Args:
        comm: any intracommunicator.
    """

    def __init__(self, comm: MPI.Comm):
        self.handle: MPI.Comm = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()

    def sum_(self, array: np.ndarray) -> None:
        self.handle.Allreduce(MPI.IN_PLACE, array, op=MPI.SUM)

    def maximum_(self, array: np.ndarray) -> None:
        self.handle.Allreduce(MPI.IN_PLACE, array, op=MPI.MAX)

    def broadcast(self, value: Any) -> Any:
        return self.handle.bcast(value)

    def broadcast_(self, array: np.ndarray) -> None:
        self.handle.Bcast(array)

    def allgather(self, value: Any) -> list[Any]:
        return self.handle.allgather(value)

    def gather(self, array: np.ndarray, rows: np.ndarray | None) -> None:
        self.handle.Gather(array, rows)

    def barrier(self) -> None:
        self.handle.Barrier()

    def sleeping_barrier(self) -> None:
        request = self.handle.Ibarrier()
        while not request.Test():
            time.sleep(0.02)

    def split(self, colour: int) -> Communicator:
        return MpiCommunicator(self.handle.Split(colour, self.rank))

    def split_by_node(self) -> Communicator:
        return MpiCommunicator(self.handle.Split_type(MPI.COMM_TYPE_SHARED, self.rank))

    def free(self) -> None:
        if self.handle not in (MPI.COMM_WORLD, MPI.COMM_SELF):
            self.handle.Free()
