"""Arrays that the ranks of a node hold once, together.

All ranks map one file that lies in memory. MPI's shared-memory windows do the same underneath, and
fail badly: one that is larger than /dev/shm hangs with Open MPI 5.0.11, and ends the process where
it is written with MPICH 4.0.2. Freeing a window is collective, so that no rank could drop its
arrays, or end with an error, by itself. torch.distributed has no windows.
"""

import errno
import mmap
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from swap_hpc.parallel.teams import Team

T = TypeVar("T")

# Fewer bytes are not worth the messages: a rank's process has some hundred MiB of its own.
MIN_BYTES = 2**20

ALIGNMENT = 64  # bytes, a cache line: where each array begins
TOKEN_BYTES = 16

# Errors of a process or a machine that has no more: another place for the file would not help.
LIMITS = {errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC}


class Form(NamedTuple):
    """The shape and type of an array that does not exist yet."""

    shape: tuple[int, ...]
    dtype: str  # numpy's name of it

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def aligned_bytes(self) -> int:
        return -(-self.bytes // ALIGNMENT) * ALIGNMENT


def part_of(number: int, team: Team) -> range:
    """Return which of `number` rows this rank of a team works on: consecutive ones."""
    return range(number * team.rank // team.size, number * (team.rank + 1) // team.size)


@dataclass(frozen=True)
class SharedArrays:
    """Arrays that some ranks fill together, and then read.

    Attributes:
        team: the ranks that have these arrays in common. It is this rank alone where the arrays are
            small, or where the node's ranks cannot have memory in common: it then has arrays of its
            own.
        arrays: C-contiguous, not initialised; by their names.
        refused: why the node's ranks could not share arrays that are worth it, with a hint where
            there is one; otherwise empty.
    """

    team: Team
    arrays: dict[str, np.ndarray]
    refused: str
    _finished: dict[str, np.ndarray]

    def finished(self) -> dict[str, np.ndarray]:
        """Return the arrays, once all ranks of `team` have filled their parts; collective over it.

        Shared ones are read-only, for good. Their memory is given back when the last rank has
        dropped the last of them, or has ended, however it ends.
        """
        self.team.barrier()
        return self._finished


def are_worth_sharing(forms: Mapping[str, Form]) -> bool:
    """Tell whether arrays are large enough that the ranks of a node hold one copy of them."""
    return sum(form.aligned_bytes for form in forms.values()) >= MIN_BYTES


def shared_arrays(node: Team, forms: Mapping[str, Form]) -> SharedArrays:
    """Make arrays of which the ranks of a node hold one copy; collective.

    Memory is set aside here, not where it is first written: what does not fit into /dev/shm, or
    exceeds the size that a process may give a file, is refused now, and each rank then has arrays
    of its own. Under a memory limit, of a job or a container, the kernel refuses nothing: it ends
    a process of the job, as it does with arrays of its own.

    Args:
        node: ranks on one node.
        forms: of the arrays, by their names; the same on all ranks.
    """
    size, begins = 0, {}
    for name, form in forms.items():
        begins[name] = size
        size += form.aligned_bytes
    shares = node.size > 1 and are_worth_sharing(forms)
    found = _mapped_by_all(node, size) if shares else ""
    if isinstance(found, str):
        own = {name: np.empty(form.shape, form.dtype) for name, form in forms.items()}
        return SharedArrays(Team.alone(), own, found, own)
    writable, read_only = (
        {name: _array(memory, begins[name], form) for name, form in forms.items()}
        for memory in found
    )
    return SharedArrays(node, writable, "", read_only)


def _array(memory: mmap.mmap, begin: int, form: Form) -> np.ndarray:
    number = int(np.prod(form.shape, dtype=np.int64))
    return np.frombuffer(memory, form.dtype, number, begin).reshape(form.shape)


class _Mapped(NamedTuple):
    """One memory, twice: the second of the two cannot be written, nor made so."""

    writable: mmap.mmap
    read_only: mmap.mmap


class _File(NamedTuple):
    """A file in memory, that one rank has made."""

    descriptor: int
    path: str  # by which other ranks open it
    remove: Callable[[], None]

    def close(self) -> None:
        """Close and remove it; what is mapped stays."""
        os.close(self.descriptor)
        with suppress(OSError):  # somebody may have cleared /dev/shm
            self.remove()


def _unnamed() -> _File:
    """Make a file that takes nothing of /dev/shm, which containers often have 64 MiB of."""
    if not hasattr(os, "memfd_create"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    descriptor = os.memfd_create("swap_hpc")
    return _File(descriptor, f"/proc/{os.getpid()}/fd/{descriptor}", lambda: None)


def _in_dev_shm() -> _File:
    """Make a file that is also found from other containers which have the same /dev/shm."""
    descriptor, path = tempfile.mkstemp(prefix="swap_hpc-", dir="/dev/shm")
    return _File(descriptor, path, lambda: os.unlink(path))


def _mapped_by_all(node: Team, size: int) -> _Mapped | str:
    """Return memory that all ranks of a node share, or why they cannot; collective."""
    unnamed = _mapped(node, size, _unnamed)
    if isinstance(unnamed, _Mapped):
        return unnamed
    in_dev_shm = _mapped(node, size, _in_dev_shm)
    return in_dev_shm if isinstance(in_dev_shm, _Mapped) else _reason(unnamed, in_dev_shm)


def _reason(unnamed: int, in_dev_shm: int) -> str:
    """Return why neither file serves, with a hint: from the numbers of the errors with the two."""
    for error, full in ((unnamed, LIMITS), (in_dev_shm, LIMITS - {errno.ENOSPC})):
        if error in full:
            hint = ": raise ulimit -f" if error == errno.EFBIG else ""
            return os.strerror(error) + hint
    return (
        "/dev/shm is too small or not one for all: "
        "start containers with --ipc=host, or with --shm-size larger than that"
    )


def _mapped(node: Team, size: int, make: Callable[[], _File]) -> _Mapped | int:
    """Let the first rank make a file, and map it on every rank; collective.

    Returns:
        The file's memory; where a rank cannot map it, the number of the system's error there.
    """
    token = node.broadcast(secrets.token_bytes(TOKEN_BYTES))
    file = node.first(lambda: _tried(lambda: _made(make, size, token)))
    try:
        found = node.broadcast(file.path if isinstance(file, _File) else file)
        if not isinstance(found, str):
            return found or errno.EIO
        begin, end = (size * place // node.size for place in (node.rank, node.rank + 1))
        mapped = node.agree(lambda: _tried(lambda: _opened(found, size, token, range(begin, end))))
    finally:
        if isinstance(file, _File):
            file.close()
    failed = node.first_where(isinstance(mapped, int))
    return mapped if failed is None else node.broadcast(_number(mapped), failed)


def _number(mapped: _Mapped | int) -> int:
    return mapped if isinstance(mapped, int) else 0


def _tried(function: Callable[[], T]) -> T | int:
    """Return `function()`, or the number of the system's error that it raises."""
    try:
        return function()
    except OSError as error:
        return error.errno or errno.EIO


def _made(make: Callable[[], _File], size: int, token: bytes) -> _File:
    """Make a file of `size` bytes that begins with `token`."""
    file = make()
    try:
        os.ftruncate(file.descriptor, size)
        os.pwrite(file.descriptor, token, 0)
    except OSError:
        file.close()
        raise
    return file


def _opened(path: str, size: int, token: bytes, part: range) -> _Mapped:
    """Map a file, and set memory aside for a part of it.

    Raises:
        OSError: that cannot be. In another container the path may lead to another file, or to
            none: `token` tells.
    """
    if os.stat(path).st_size != size:
        raise _another_file(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.pread(descriptor, TOKEN_BYTES, 0) != token:
            raise _another_file(path)
        # A full /dev/shm is an error here; later, a page without memory would end the process where
        # it is first written. What exceeds a control group's limit is no error: the kernel ends a
        # process of the group, here too.
        os.posix_fallocate(descriptor, part.start, len(part))
        return _Mapped(
            mmap.mmap(descriptor, size), mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        )
    finally:
        os.close(descriptor)


def _another_file(path: str) -> OSError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
