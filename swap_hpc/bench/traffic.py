"""Bytes that this process sends by MPI, as Open MPI's monitoring component counts them.

The counts are read by the tools interface of MPI (MPI_T).
"""

import ctypes

from swap_hpc.errors import UserError
from swap_hpc.parallel.mpi import handle_address, mpi_library_file
from swap_hpc.parallel.teams import Team

# Bytes sent to each rank of the world, over all communicators.
VARIABLE = b"pml_monitoring_messages_size"
# The component sees point-to-point messages, and what collectives send by them: collectives that
# also use shared memory are switched off.
SETTINGS = {"OMPI_MCA_pml_monitoring_enable": "1", "OMPI_MCA_coll": "^han,sm,xhc,acoll"}
NEEDS = "bench scaling needs Open MPI with its monitoring component"


class Traffic:
    """A counter of the bytes that this process sends, from its creation on.

    The job has to be started with `SETTINGS` in its environment.
    """

    def __init__(self, world: Team) -> None:
        """
        Raises:
            UserError: the MPI library does not count.
        """
        self._library = ctypes.CDLL(mpi_library_file())
        self._handle = ctypes.c_void_p()
        self._session = ctypes.c_void_p()
        self._number = ctypes.c_int()  # of counts: one per rank of the world
        thread_level = ctypes.byref(ctypes.c_int())
        self._call("MPI_T_init_thread", 0, thread_level)
        self._call("MPI_T_pvar_session_create", ctypes.byref(self._session))
        communicator = ctypes.byref(ctypes.c_void_p.from_address(handle_address(world)))
        self._call(
            "MPI_T_pvar_handle_alloc",
            self._session,
            self._index(),
            communicator,
            ctypes.byref(self._handle),
            ctypes.byref(self._number),
        )
        self._call("MPI_T_pvar_start", self._session, self._handle)

    def sent(self) -> int:
        """Return the bytes sent so far, to all ranks."""
        counts = (ctypes.c_size_t * self._number.value)()
        self._call("MPI_T_pvar_read", self._session, self._handle, counts)
        return sum(counts)

    def _index(self) -> int:
        """Return the number that this MPI library gives `VARIABLE`."""
        number = ctypes.c_int()
        self._call("MPI_T_pvar_get_num", ctypes.byref(number))
        for index in range(number.value):
            if self._name(index) == VARIABLE:
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
