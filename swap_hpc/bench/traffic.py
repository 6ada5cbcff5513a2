"""Bytes that this process sent by MPI, counted by Open MPI itself: its monitoring component, read by the tools interface (MPI_T)."""

import ctypes

from swap_hpc.errors import UserError
from swap_hpc.parallel.mpi import handle_address, mpi_library_file
from swap_hpc.parallel.teams import Team

VARIABLE = (
    b"pml_monitoring_messages_size"  # bytes sent to each rank of the world, over all communicators
)
# Monitoring sees what goes through point-to-point messages: collectives that use shared memory beside them are left out.
SETTINGS = {"OMPI_MCA_pml_monitoring_enable": "1", "OMPI_MCA_coll": "^han,sm,xhc,acoll"}


class Traffic:
    """Counts from now on. The job has to be started with `SETTINGS` in its environment."""

    def __init__(self, world: Team) -> None:
        """Raises UserError where the MPI library does not count."""
        self._library = ctypes.CDLL(mpi_library_file())
        self._handle, self._session, self._number = (
            ctypes.c_void_p(),
            ctypes.c_void_p(),
            ctypes.c_int(),
        )
        self._call("MPI_T_init_thread", 0, ctypes.byref(ctypes.c_int()))
        self._call("MPI_T_pvar_session_create", ctypes.byref(self._session))
        communicator = ctypes.byref(ctypes.c_void_p.from_address(handle_address(world)))
        handle, number = ctypes.byref(self._handle), ctypes.byref(self._number)
        self._call(
            "MPI_T_pvar_handle_alloc", self._session, self._index(), communicator, handle, number
        )
        self._call("MPI_T_pvar_start", self._session, self._handle)

    def sent(self) -> int:
        """Bytes so far, to all ranks."""
        counts = (ctypes.c_size_t * self._number.value)()
        self._call("MPI_T_pvar_read", self._session, self._handle, counts)
        return sum(counts)

    def _index(self) -> int:
        number = ctypes.c_int()
        self._call("MPI_T_pvar_get_num", ctypes.byref(number))
        for index in range(number.value):
            name, length = ctypes.create_string_buffer(256), ctypes.c_int(256)
            numbers = [ctypes.byref(ctypes.c_int()) for _ in range(6)]
            kind, names, nothing = (ctypes.byref(ctypes.c_void_p()) for _ in range(3))
            verbosity, variable_class, bind, read_only, continuous, atomic = numbers
            self._call(
                "MPI_T_pvar_get_info", index, name, ctypes.byref(length), verbosity, variable_class, kind, names, None, nothing, bind,
                read_only, continuous, atomic,
            )  # fmt: skip
            if name.value == VARIABLE:
                return index
        raise UserError(
            "this MPI library does not count what it sends: bench scaling needs Open MPI with its monitoring component"
        )

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise UserError(
                f"{name} failed with {code}: bench scaling needs Open MPI with its monitoring component"
            )
