"""The MPI library: its name and file, its host names, and whether the launcher belongs to it."""

import re
from contextlib import suppress

from mpi4py import MPI

from swap_hpc.errors import UserError
from swap_hpc.parallel.launcher import advice, launched, left_over, refusal
from swap_hpc.parallel.mpi_communicator import MpiCommunicator
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.wording import count


def abort(code: int) -> None:
    """End every rank of the job at once."""
    MPI.COMM_WORLD.Abort(code)


def world_rank() -> int:
    """Return this process's rank among those that MPI sees."""
    return MPI.COMM_WORLD.Get_rank()


def world_size() -> int:
    """Return the number of ranks that MPI sees."""
    return MPI.COMM_WORLD.Get_size()


def world_as_seen() -> Team:
    """Return the team of all ranks that MPI sees, also where a launcher started more."""
    return Team(MpiCommunicator(MPI.COMM_WORLD))


def check_launcher(comm: MPI.Comm) -> None:
    """Check that a communicator's ranks can be those of the job.

    Raises:
        UserError: a launcher started more ranks than MPI sees, and `comm` is not meant to be this
            rank alone.
    """
    mismatch = launcher_mismatch() if comm != MPI.COMM_SELF else None
    if mismatch:
        raise UserError(mismatch)


def launcher_mismatch() -> str | None:
    """Return one line with a hint where a launcher started more ranks than MPI sees, else None.

    An MPI library that does not know its launcher makes a world of one of each process.
    """
    by_launcher = launched()
    if by_launcher is None or by_launcher.size <= world_size():
        return None
    if by_launcher.by_torch:
        return refusal(by_launcher, world_size())
    library = mpi_library()
    return (
        f"{by_launcher.by} started {count(by_launcher.size, 'rank')}, "
        f"but MPI sees a world of {world_size()}: launcher and MPI library do not match; "
        f"use the mpirun that belongs to {library} "
        f"(with srun: {advice(library).srun}, or the type that this library was built for); "
        f"{left_over(by_launcher)}"
    )


def mpi_library() -> str:
    """Return the name and version of the MPI library, for example "MPICH 4.0.2"."""
    first = MPI.Get_library_version().partition(",")[0].partition("\n")[0].strip("\0 ")
    return re.sub(r" Version:\s*", " ", first)  # MPICH's "MPICH Version:      4.0.2"


def mpi_library_file() -> str | None:
    """Return the file of the MPI library that this process loaded; None where Linux does not tell.

    In a container it shows whether MPI is the image's or the host's.
    """
    with (
        suppress(OSError),
        open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps,
    ):
        for line in maps:
            if re.search(r"/libmpi\.so|/libmpich\.so", line):
                return line.split(maxsplit=5)[5].strip()
    return None


def handle_address(team: Team) -> int:
    """Return the address of the communicator's handle, for calls that mpi4py does not have."""
    return MPI._addressof(team.comm)


def thread_level() -> str:
    """Return the thread support that MPI was initialised with, for example "multiple".

    Horovod and mpi4py in one process need "multiple".
    """
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    return levels[MPI.Query_thread()]


def host() -> str:
    """Return the name of this host."""
    return MPI.Get_processor_name()
