"""What a `Team` needs of the library that connects its ranks. Imports neither torch nor MPI."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class Communicator(ABC):
    """Some ranks, and collectives over numpy arrays and small Python objects.

    Arrays are C-contiguous, and small enough for one message.

    Attributes:
        handle: mpi4py's communicator, for other libraries; None without MPI.
        rank: this process's rank, from 0.
        size: the number of ranks.
    """

    handle: Any
    rank: int
    size: int

    @abstractmethod
    def sum_(self, array: np.ndarray) -> None:
        """Replace a float64 or int64 array by its sum over the ranks."""

    @abstractmethod
    def maximum_(self, array: np.ndarray) -> None:
        """Replace a float64 array by its elements' maxima over the ranks."""

    @abstractmethod
    def broadcast(self, value: Any, root: int) -> Any:
        """Return the `value` of the rank `root`."""

    @abstractmethod
    def broadcast_(self, array: np.ndarray) -> None:
        """Replace a uint8 array by the first rank's."""

    @abstractmethod
    def allgather(self, value: Any) -> list[Any]:
        """Return the ranks' values, in the order of the ranks."""

    @abstractmethod
    def gather(self, array: np.ndarray, rows: np.ndarray | None) -> None:
        """Write the ranks' arrays, (n,) uint8, into `rows`, (ranks, n); None on other ranks."""

    @abstractmethod
    def scatter(self, rows: np.ndarray | None, array: np.ndarray) -> None:
        """Write each rank's row of `rows`, (ranks, n) uint8, into `array`; None on other ranks."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait until all ranks are here."""

    @abstractmethod
    def sleeping_barrier(self) -> None:
        """Wait like `barrier`, and leave the core to others meanwhile."""

    @abstractmethod
    def part(self, members: range) -> "Communicator":
        """Return a communicator of some ranks, this one among them, in their present order."""

    @abstractmethod
    def split(self, colour: int) -> "Communicator":
        """Return a communicator of the ranks that give the same number, in their present order."""

    @abstractmethod
    def split_by_node(self) -> "Communicator":
        """Return a communicator of the ranks on this rank's node, in their present order."""

    @abstractmethod
    def free(self) -> None:
        """Give back what a split took; the communicators that the job began with stay."""


class Alone(Communicator):
    """A rank by itself, for which no library is loaded."""

    handle = None
    rank = 0
    size = 1

    def sum_(self, array: np.ndarray) -> None:
        pass

    def maximum_(self, array: np.ndarray) -> None:
        pass

    def broadcast(self, value: Any, root: int) -> Any:
        return value

    def broadcast_(self, array: np.ndarray) -> None:
        pass

    def allgather(self, value: Any) -> list[Any]:
        return [value]

    def gather(self, array: np.ndarray, rows: np.ndarray | None) -> None:
        assert rows is not None
        rows[0] = array

    def scatter(self, rows: np.ndarray | None, array: np.ndarray) -> None:
        assert rows is not None
        array[:] = rows[0]

    def barrier(self) -> None:
        pass

    def sleeping_barrier(self) -> None:
        pass

    def part(self, members: range) -> Communicator:
        return self

    def split(self, colour: int) -> Communicator:
        return self

    def split_by_node(self) -> Communicator:
        return self

    def free(self) -> None:
        pass
