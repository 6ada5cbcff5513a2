"""Ranks that torch.distributed connects: no MPI is needed.

A process group of the user's is not used itself. Its backend may be NCCL, which takes no tensors of
the host, and its time-out ends a collective for which a rank is late by more than 10 or 30 minutes.
In phase 2 ranks are alone for longer than that. So its ranks are connected once more, through the
same store, by gloo, without a time-out.
"""

import hashlib
import pickle
import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import distributed

from swap_hpc.parallel.communicator import Alone, Communicator

FOREVER = timedelta(days=10_000)

_made: Counter[str] = Counter()  # by the process group's name
_connected: "WeakKeyDictionary[distributed.ProcessGroup, GlooCommunicator]" = WeakKeyDictionary()


def of_process_group(group: distributed.ProcessGroup) -> "GlooCommunicator":
    """Return the communicator of a process group's ranks.

    Collective over the group, when it is first called for it in this process.
    """
    if group not in _connected:
        # The name agrees without a message: the group's own would be subject to its time-out. It
        # differs from that of an earlier group of the same name, whose keys may still be there.
        number = _made[group.group_name]
        _made[group.group_name] += 1
        prefix = f"swap_hpc/{group.group_name}/{number}"
        store = distributed.PrefixStore(prefix, group.get_group_store())
        _connected[group] = GlooCommunicator(store, group.rank(), group.size())
    return _connected[group]


class GlooCommunicator(Communicator):
    """Ranks connected by gloo.

    Args:
        store: through which the ranks find each other; no other communicator uses it.
        rank: this process's, from 0.
        size: the number of ranks.
    """

    handle = None

    def __init__(self, store: distributed.Store, rank: int, size: int):
        self.rank = rank
        self.size = size
        self._store = store
        self._splits = 0  # so far: each has keys of its own in the store
        # torch declares no collectives of this class, which has those of every backend.
        self._gloo: Any = distributed.ProcessGroupGloo(store, rank, size, timeout=FOREVER)

    def sum_(self, array: np.ndarray) -> None:
        self._reduce_(array, distributed.ReduceOp.SUM)

    def maximum_(self, array: np.ndarray) -> None:
        self._reduce_(array, distributed.ReduceOp.MAX)

    def _reduce_(self, array: np.ndarray, operation: Any) -> None:
        options = distributed.AllreduceOptions()
        options.reduceOp = operation
        self._gloo.allreduce([torch.from_numpy(array)], options).wait()

    def broadcast(self, value: Any, root: int) -> Any:
        packed = _packed(value)
        size = np.array([len(packed)])
        self._broadcast_(size, root)
        if self.rank != root:
            packed = np.empty(size[0], np.uint8)
        self._broadcast_(packed, root)
        return pickle.loads(packed.tobytes())

    def broadcast_(self, array: np.ndarray) -> None:
        self._broadcast_(array, 0)

    def _broadcast_(self, array: np.ndarray, root: int) -> None:
        self._gloo.broadcast(torch.from_numpy(array), root).wait()

    def allgather(self, value: Any) -> list[Any]:
        packed = _packed(value)
        sizes = self._allgathered(np.array([len(packed)])).ravel()
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: len(packed)] = packed
        rows = self._allgathered(padded)
        return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def _allgathered(self, array: np.ndarray) -> np.ndarray:
        """Return the ranks' arrays, (n,) of the same length, as (ranks, n)."""
        rows = torch.from_numpy(np.empty((self.size, len(array)), array.dtype))
        self._gloo.allgather(list(rows), torch.from_numpy(array)).wait()
        return rows.numpy()

    def gather(self, array: np.ndarray, rows: np.ndarray | None) -> None:
        received = [] if rows is None else list(torch.from_numpy(rows))
        self._gloo.gather(received, torch.from_numpy(array), 0).wait()

    def scatter(self, rows: np.ndarray | None, array: np.ndarray) -> None:
        sent = [] if rows is None else list(torch.from_numpy(rows))
        self._gloo.scatter(torch.from_numpy(array), sent, 0).wait()

    def barrier(self) -> None:
        self._gloo.barrier().wait()

    def sleeping_barrier(self) -> None:
        self.barrier()  # gloo sleeps while it waits

    def part(self, members: range) -> Communicator:
        return self._connected(members, f"{members.start}-{members.step}")

    def split(self, colour: int) -> Communicator:
        colours = self._allgathered(np.array([colour])).ravel()
        return self._connected(np.flatnonzero(colours == colour).tolist(), f"{colour}")

    def _connected(self, members: Sequence[int], name: str) -> Communicator:
        """Return a communicator of some ranks, whose name is not that of another part."""
        number = self._splits
        self._splits += 1
        if len(members) == 1:
            return Alone()
        store = distributed.PrefixStore(f"{number}/{name}", self._store)
        return GlooCommunicator(store, members.index(self.rank), len(members))

    def split_by_node(self) -> Communicator:
        return self.split(_node())

    def free(self) -> None:
        if self not in _connected.values():
            self._gloo.shutdown()


def _packed(value: Any) -> np.ndarray:
    return np.frombuffer(bytearray(pickle.dumps(value)), np.uint8)


def _node() -> int:
    """Return a number that the processes on this node, and in this container, have in common."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    name = f"{socket.gethostname()} {boot}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
