"""`Team`: ranks, and the collectives that the package needs.

Imports neither torch nor MPI before it knows which of them connects the ranks.
"""

import hashlib
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from swap_hpc.errors import RunError, UserError, explained
from swap_hpc.parallel.communicator import Alone, Communicator
from swap_hpc.parallel.launcher import launched, launched_for_mpi, mpi_is_started, refusal

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch.distributed import ProcessGroup

T = TypeVar("T")

# MPI counts elements in 32 bits, and a library may copy a message: larger ones are cut.
BROADCAST_BYTES = 2**26


def nothing() -> Any:
    """Return None: the part of a rank that only takes part in `Team.agree`."""
    return None


class Team:
    """Ranks that MPI or torch.distributed connects, and the few collectives that the package needs.

    Every method but `alone` is collective: all ranks of the team must call it, in the same order.
    In a team of one, no method but `split` and `free` communicates.

    A process group's ranks are connected once more, by gloo, when its first team is made: all of
    them must make one. That connection has no time-out, takes NCCL's ranks as well, and outlives
    the process group.

    Args:
        comm: any intracommunicator of mpi4py, or any `torch.distributed.ProcessGroup` that this
            rank belongs to.

    Attributes:
        comm: mpi4py's communicator or the process group. None in `alone`, and in a part of a
            process group.
        rank: this process's rank in it, from 0.
        size: the number of its ranks.

    Raises:
        UserError: a launcher started more ranks than MPI sees.
    """

    def __init__(self, comm: "MPI.Comm | ProcessGroup | Communicator"):
        self._communicator = comm if isinstance(comm, Communicator) else _communicator(comm)
        self.comm: Any = comm.handle if isinstance(comm, Communicator) else comm
        self.rank = self._communicator.rank
        self.size = self._communicator.size

    @classmethod
    def world(cls) -> "Team":
        """Return the team of all ranks of the job: MPI's, or those of torch's default group.

        They are torch's where `torch.distributed.init_process_group` was called, unless this
        process has started MPI, and MPI sees as many ranks.

        Raises:
            UserError: a launcher started more ranks than MPI or torch.distributed sees.
        """
        group = _default_group()
        by_launcher = launched()
        ranks = by_launcher.size if by_launcher else 1
        if group and group.size() >= ranks and not _mpi_sees(group.size()):
            return cls(group)
        # MPI is not even started where torch's launcher started the ranks: each would be alone.
        if by_launcher and by_launcher.by_torch and not _mpi_sees(by_launcher.size):
            raise UserError(refusal(by_launcher, _seen_by_mpi()))
        from mpi4py import MPI

        return cls(MPI.COMM_WORLD)

    @classmethod
    def alone(cls) -> "Team":
        """Return the team of this rank alone."""
        return cls(Alone())

    def part(self, members: range) -> "Team":
        """Return the team of some ranks, this one among them, in their present order.

        All ranks of this team call it, each for its own part; no rank is in two of them. Unlike
        `split`, nothing is sent but among the members of a part.

        Raises:
            ValueError: this rank is not among `members`.
        """
        if self.rank not in members:
            raise ValueError(f"rank {self.rank} is not among the ranks {[*members]} of its part")
        return Team(self._communicator.part(members))

    def split(self, colour: int) -> "Team":
        """Return the team of the ranks that give the same number, in their present order."""
        return Team(self._communicator.split(colour))

    def split_by_node(self) -> "Team":
        """Return the team of the ranks on this rank's node, in their present order."""
        return Team(self._communicator.split_by_node())

    def sum_(self, array: np.ndarray) -> np.ndarray:
        """Replace a C-contiguous float64 or int64 array by its sum over the team, and return it."""
        assert array.dtype in (np.float64, np.int64) and array.flags.c_contiguous
        if self.size > 1:
            self._communicator.sum_(array)
        return array

    def sums(self, *values: float) -> list[float]:
        """Return each value's sum over the team, in float64."""
        return self.sum_(np.array(values, dtype=np.float64)).tolist()

    def maximum(self, *values: float) -> list[float]:
        """Return each value's maximum over the team, in float64."""
        array = np.array(values, dtype=np.float64)
        if self.size > 1:
            self._communicator.maximum_(array)
        return array.tolist()

    def any(self, flag: bool) -> bool:
        """Tell whether `flag` is true on a rank of the team."""
        return self.maximum(float(flag))[0] > 0

    def first_where(self, flag: bool) -> int | None:
        """Return the first rank on which `flag` is true; None if it is true on none."""
        first = -self.maximum(-self.rank if flag else -self.size)[0]
        return int(first) if first < self.size else None

    def first_unlike(self, content: bytes) -> int | None:
        """Return the first rank whose `content` differs from the first rank's; None: all are alike.

        The ranks compare a hash of 128 bits, by one small reduction. More is sent only where they
        differ.
        """
        words = np.frombuffer(hashlib.sha256(content).digest()[:16], "<u4").astype(np.float64)
        # The smallest of a word is minus the largest of the negated ones.
        largest = self.maximum(*words, *-words)
        if all(high == -low for high, low in zip(largest[:4], largest[4:], strict=True)):
            return None
        mine = words.tolist()
        return self.first_where(self.broadcast(mine) != mine)

    def broadcast(self, value: T, root: int = 0) -> T:
        """Return the `value`, a small Python object, of the first rank or of the rank `root`."""
        return self._communicator.broadcast(value, root) if self.size > 1 else value

    def broadcast_(self, array: np.ndarray) -> np.ndarray:
        """Replace a contiguous uint8 array by the first rank's, and return it."""
        if self.size > 1:
            for start in range(0, array.size, BROADCAST_BYTES):
                self._communicator.broadcast_(array[start : start + BROADCAST_BYTES])
        return array

    def allgather(self, value: T) -> list[T]:
        """Return every rank's `value`, a small Python object, in the order of the ranks.

        What each rank receives grows with the number of ranks: often the first rank alone needs the
        values (`gathered`), or whether they are alike (`first_unlike`).
        """
        return self._communicator.allgather(value) if self.size > 1 else [value]

    def gather(self, array: np.ndarray) -> np.ndarray | None:
        """Return the ranks' arrays, (n,) uint8, as (ranks, n) on the first rank; None on others."""
        if self.size == 1:
            return array[None]
        rows = np.empty((self.size, len(array)), np.uint8) if self.rank == 0 else None
        self._communicator.gather(array, rows)
        return rows

    def gathered(self, value: T) -> list[T] | None:
        """Return every rank's `value`, a small Python object, on the first rank; None on others."""
        packed = np.frombuffer(pickle.dumps(value), np.uint8)
        longest = int(self.maximum(len(packed))[0])
        rows = self.gather(np.pad(packed, (0, longest - len(packed))))
        # what follows a pickled object is not read
        return None if rows is None else [pickle.loads(row.tobytes()) for row in rows]

    def scatter(self, rows: np.ndarray | None) -> np.ndarray:
        """Return this rank's row, (n,) uint8, of the first rank's `rows`, (ranks, n)."""
        width = self.broadcast(0 if rows is None else rows.shape[1])
        array = np.empty(width, np.uint8)
        self._communicator.scatter(rows if self.rank == 0 else None, array)
        return array

    def scattered(self, values: Sequence[T] | None) -> T:
        """Return this rank's object of the first rank's `values`, one for each rank."""
        rows = None
        if self.rank == 0:
            assert values is not None and len(values) == self.size
            packed = [np.frombuffer(pickle.dumps(value), np.uint8) for value in values]
            longest = max(map(len, packed))
            rows = np.stack([np.pad(each, (0, longest - len(each))) for each in packed])
        return pickle.loads(self.scatter(rows).tobytes())

    def first(self, function: Callable[[], T]) -> T | None:
        """Return `function()`, called on the first rank alone, and None on the others.

        An error that it raises is raised on all ranks.
        """
        return self.agree(function if self.rank == 0 else nothing)

    def barrier(self) -> None:
        """Wait until all ranks of the team are here."""
        if self.size > 1:
            self._communicator.barrier()

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
        first = self.first_where(error is not None)
        if first is None:
            return result  # type: ignore[return-value]
        # Only now is the error sent: no rank ever receives something of every rank.
        shared = self.broadcast(_portable(error) if self.rank == first else None, first)
        assert shared is not None
        shared.reported_elsewhere = first != self.rank
        raise shared from None

    def first_while_others_sleep(self, function: Callable[[], T]) -> T:
        """Return `function()`, called on the first rank alone, on all ranks.

        The other ranks give their cores away meanwhile, to a function that uses many threads. An
        error of `function` is raised on the first rank alone, and the others wait until the job is
        ended.
        """
        if self.size == 1:
            return function()
        result = function() if self.rank == 0 else None
        self._communicator.sleeping_barrier()
        return self.broadcast(result)  # type: ignore[return-value]

    def free(self) -> None:
        """Free the communicator, unless it is MPI's own or that of a process group."""
        self._communicator.free()


def _communicator(comm: Any) -> Communicator:
    if hasattr(comm, "Get_rank"):
        from swap_hpc.parallel.mpi import check_launcher
        from swap_hpc.parallel.mpi_communicator import MpiCommunicator

        check_launcher(comm)
        return MpiCommunicator(comm)
    from torch.distributed import ProcessGroup

    if not isinstance(comm, ProcessGroup):
        raise TypeError(
            f"a team is made of a communicator of mpi4py or of a ProcessGroup that this rank "
            f"belongs to, not of {comm!r}"
        )
    from swap_hpc.parallel.gloo_communicator import of_process_group

    return of_process_group(comm)


def _default_group() -> "ProcessGroup | None":
    """Return torch.distributed's default group; None if it has not been initialised."""
    distributed = sys.modules.get("torch.distributed")
    if not distributed or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.group.WORLD


def _mpi_sees(ranks: int) -> bool:
    """Tell whether this process has started MPI, with a world of so many ranks or more."""
    return mpi_is_started() and _seen_by_mpi() >= ranks


def _seen_by_mpi() -> int:
    """Return the ranks of MPI's world; where MPI is not started, those of its launcher."""
    if not mpi_is_started():
        by_launcher = launched_for_mpi()
        return by_launcher.size if by_launcher else 1
    from swap_hpc.parallel.mpi import world_size

    return world_size()


def _portable(error: Exception | None) -> UserError | RunError | None:
    """Return an error that another rank can raise, too; the traceback of an unexpected one is text.

    Other exceptions may not survive pickling, which sends them.
    """
    error = explained(error) if error else None
    if error is None or isinstance(error, UserError | RunError):
        return error
    return RunError("".join(traceback.format_exception(error)))
