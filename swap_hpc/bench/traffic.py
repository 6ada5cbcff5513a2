"""What this process sends by MPI, as Open MPI's monitoring component counts it.

The counts are read by the tools interface of MPI (MPI_T).
"""

import ctypes
from typing import NamedTuple

import numpy as np

from swap_hpc.errors import UserError
from swap_hpc.parallel.mpi import handle_address, mpi_library_file
from swap_hpc.parallel.teams import Team

# Messages and bytes sent to each rank of the world, over all communicators.
MESSAGES, BYTES = b"pml_monitoring_messages_count", b"pml_monitoring_messages_size"
# The component sees point-to-point messages, and what collectives send by them: collectives that
# also use shared memory are switched off.
SETTINGS = {"OMPI_MCA_pml_monitoring_enable": "1", "OMPI_MCA_coll": "^han,sm,xhc,acoll"}
MPI_THREAD_MULTIPLE = 3  # in Open MPI
NEEDS = "this bench needs Open MPI with its monitoring component"


class Sent(NamedTuple):
    """What a process has sent to each rank of the world, (ranks,) int64 each."""

    messages: np.ndarray
    bytes: np.ndarray

    def since(self, earlier: "Sent") -> "Sent":
        """Return what was sent after an earlier count."""
        return Sent(self.messages - earlier.messages, self.bytes - earlier.bytes)


class Traffic:
    """A counter of what this process sends, from its creation on.

    The job has to be started with `SETTINGS` in its environment.
    """

    def __init__(self, world: Team) -> None:
        """
        Raises:
            UserError: the MPI library does not count.
        """
        self._library = ctypes.CDLL(mpi_library_file())
        self._session = ctypes.c_void_p()
        provided = ctypes.byref(ctypes.c_int())
        # Open MPI takes this for the level of MPI itself, too: Horovod would warn of a lower one.
        self._call("MPI_T_init_thread", MPI_THREAD_MULTIPLE, provided)
        self._call("MPI_T_pvar_session_create", ctypes.byref(self._session))
        self._ranks = world.size
        self._messages, self._bytes = self._started(MESSAGES, world), self._started(BYTES, world)

    def sent(self) -> int:
        """Return the bytes sent so far, to all ranks."""
        return int(self._read(self._bytes).sum())

    def counts(self) -> Sent:
        """Return what was sent so far, to each rank."""
        return Sent(self._read(self._messages), self._read(self._bytes))

    def _started(self, variable: bytes, world: Team) -> ctypes.c_void_p:
        """Start to count, and return the handle of the counts, one for each rank of the world."""
        handle, number = ctypes.c_void_p(), ctypes.c_int()
        communicator = ctypes.byref(ctypes.c_void_p.from_address(handle_address(world)))
        self._call(
            "MPI_T_pvar_handle_alloc",
            self._session,
            self._index(variable),
            communicator,
            ctypes.byref(handle),
            ctypes.byref(number),
        )
        assert number.value == world.size
        self._call("MPI_T_pvar_start", self._session, handle)
        return handle

    def _read(self, handle: ctypes.c_void_p) -> np.ndarray:
        counts = (ctypes.c_size_t * self._ranks)()
        self._call("MPI_T_pvar_read", self._session, handle, counts)
        return np.array(counts, dtype=np.int64)

    def _index(self, variable: bytes) -> int:
        """Return the number that this MPI library gives a variable."""
        number = ctypes.c_int()
        self._call("MPI_T_pvar_get_num", ctypes.byref(number))
        for index in range(number.value):
            if self._name(index) == variable:
                return index
        raise UserError(f"this MPI library does not count what it sends: {NEEDS}")

    def _name(self, index: int) -> bytes:
        name, length = ctypes.create_string_buffer(256), ctypes.c_int(256)
        # The other answers are not used, but all except the description need a place.
        verbosity, variable_class, bind, read_only, continuous, atomic = (
            ctypes.byref(ctypes.c_int()) for _ in range(6)
        )
        kind, names, description_length = (ctypes.byref(ctypes.c_void_p()) for _ in range(3))
        self._call(
            "MPI_T_pvar_get_info",
            index,
            name,
            ctypes.byref(length),
            verbosity,
            variable_class,
            kind,
            names,
            None,  # the description
            description_length,
            bind,
            read_only,
            continuous,
            atomic,
        )
        return name.value

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise UserError(f"{name} failed with {code}: {NEEDS}")
