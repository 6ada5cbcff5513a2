"""The MPI library: its name and file, its host names, and whether the launcher belongs to it."""

import re
from contextlib import suppress

from mpi4py import MPI

from swap_hpc.parallel.launcher import advice, launched
from swap_hpc.parallel.teams import Team


def abort(code: int) -> None:
    """Ends every rank of the job, at once."""
    MPI.COMM_WORLD.Abort(code)


def launcher_mismatch(world: Team) -> str | None:
    """One line where the launcher started more ranks than MPI sees, else None."""
    told = launched()
    if told is None or told.size == world.size:
        return None
    return (
        f"{told.by} started {told.size} ranks, but MPI sees a world of {world.size}: launcher and MPI library do not match; "
        f"use the mpirun that belongs to {mpi_library()} "
        f"(with srun: {advice(mpi_library()).srun}, or the type that this library was built for)"
    )


def mpi_library() -> str:
    """The MPI library in one line, for example "Open MPI v5.0.11" or "MPICH 4.0.2"."""
    first = MPI.Get_library_version().partition(",")[0].partition("\n")[0].strip("\0 ")
    return re.sub(r" Version:\s*", " ", first)  # MPICH's "MPICH Version:      4.0.2"


def mpi_library_file() -> str | None:
    """The file of the MPI library that this process loaded: in a container it shows whose MPI it is. None where the system does not say."""
    with (
        suppress(OSError),
        open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps,
    ):
        return next(
            (
                line.split(maxsplit=5)[5].strip()
                for line in maps
                if re.search(r"/libmpi\.so|/libmpich\.so", line)
            ),
            None,
        )
    return None


def handle_address(team: Team) -> int:
    """Where the communicator's handle lies, for calls into the MPI library that mpi4py does not have."""
    return MPI._addressof(team.comm)


def thread_level() -> str:
    """The thread support that MPI was initialised with. Horovod and mpi4py side by side want "multiple"."""
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    return levels[MPI.Query_thread()]


def host() -> str:
    return MPI.Get_processor_name()
