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

    def broadcast(self, value: Any, root: int) -> Any:
        return self.handle.bcast(value, root)

    def broadcast_(self, array: np.ndarray) -> None:
        self.handle.Bcast(array)

    def allgather(self, value: Any) -> list[Any]:
        return self.handle.allgather(value)

    def gather(self, array: np.ndarray, rows: np.ndarray | None) -> None:
        self.handle.Gather(array, rows)

    def scatter(self, rows: np.ndarray | None, array: np.ndarray) -> None:
        self.handle.Scatter(rows, array)

    def barrier(self) -> None:
        self.handle.Barrier()

    def sleeping_barrier(self) -> None:
        request = self.handle.Ibarrier()
        while not request.Test():
            time.sleep(0.02)

    def part(self, members: range) -> Communicator:
        # MPI's Split would send every rank's number to every rank. Here only the members talk. A
        # row and a column of a grid have tags of their own.
        mine = self.handle.Get_group()
        group = mine.Range_incl([(members[0], members[-1], members.step)])
        made = MPI.Intracomm(self.handle).Create_group(group, members.step)
        group.Free()
        mine.Free()
        return MpiCommunicator(made)

    def split(self, colour: int) -> Communicator:
        return MpiCommunicator(self.handle.Split(colour, self.rank))

    def split_by_node(self) -> Communicator:
        # One key for all keeps the order. With several, Open MPI would compare all ranks' keys.
        return MpiCommunicator(self.handle.Split_type(MPI.COMM_TYPE_SHARED, 0))

    def free(self) -> None:
        if self.handle not in (MPI.COMM_WORLD, MPI.COMM_SELF):
            self.handle.Free()
