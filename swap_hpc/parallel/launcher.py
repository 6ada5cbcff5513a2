"""Launchers of ranks: their environment variables, their options, and their command lines.

Imports neither torch nor MPI.

A rank read from a launcher's variables serves two purposes. It lets one process print before MPI is
started, or where MPI is never started, as on a login node. And it is compared with MPI's: where an
MPI library does not know its launcher, each process is a world of one rank.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from swap_hpc.errors import UserError

VARIABLES = {
    "Open MPI's mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH's mpirun": ("PMI_RANK", "PMI_SIZE"),  # also HPE's PALS, and Intel's
    "MVAPICH's mpirun_rsh": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    "IBM's jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    "Flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    "horovodrun": ("HOROVOD_RANK", "HOROVOD_SIZE"),  # with gloo; else it calls mpirun
    # last: a step of one task may hold another launcher
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
}

# What torchrun, accelerate and DeepSpeed set; Lightning, where it starts the ranks, only the second
# pair.
TORCH = "torchrun or the like"
TORCH_VARIABLES = [("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "WORLD_SIZE")]

# Lets ranks outnumber cores, unbound, under the mpirun of Open MPI 4 and 5, which refuses that
# otherwise, and under Intel's, which would pin them. These are variables and not options, because
# MPICH's mpirun, which allows it anyway, refuses Open MPI's options and ignores its variables.
CROWDED = {
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "I_MPI_PIN": "off",
}

NO_MPI = "MPI4PY_RC_INITIALIZE"  # read by mpi4py when it is imported

PARENT = os.getppid()  # when this process began; another one now means that the launcher has died


def mpi_is_started() -> bool:
    """Tell whether this process has started MPI."""
    library = sys.modules.get("mpi4py.MPI")
    return library is not None and library.Is_initialized() and not library.Is_finalized()


@contextmanager
def children_without_mpi() -> Iterator[None]:
    """Keep MPI from being started in child processes that begin in the context.

    A child of a rank inherits the launcher's variables: importing mpi4py would make it that rank.
    """
    before = os.environ.get(NO_MPI)
    os.environ[NO_MPI] = "false"
    try:
        yield
    finally:
        del os.environ[NO_MPI]
        if before is not None:
            os.environ[NO_MPI] = before


class Advice(NamedTuple):
    """The options with which to start ranks, for one family of MPI libraries."""

    srun: str  # Slurm's option that the library understands
    neighbours: str  # the mpirun that places consecutive ranks on one node


def advice(library: str) -> Advice:
    """Return the launcher options for an MPI library.

    Args:
        library: its name and version, for example "MPICH 4.0.2".
    """
    if library.startswith("Open MPI"):
        return Advice("--mpi=pmix", "mpirun --map-by slot")
    return Advice("--mpi=pmi2", "mpirun -ppn RANKS_OF_A_NODE")


class Launched(NamedTuple):
    """A launcher, and this process's place among the ranks that it started."""

    by: str  # a key of `VARIABLES`, or `TORCH`
    rank: int
    size: int

    @property
    def by_torch(self) -> bool:
        return self.by == TORCH


def launched() -> Launched | None:
    """Return how this process was launched; None if it was started alone.

    Values that no launcher would set also count as started alone, and so does a single rank of
    torch's launchers, whose variables may be left over.
    """
    by_mpi = launched_for_mpi()
    by_torch = next(filter(None, (_place(TORCH, names) for names in TORCH_VARIABLES)), None)
    if by_torch is None or by_torch.size == 1:
        return by_mpi
    # srun and mpirun may have started torchrun, one per node. Under mpirun a job may also have set
    # torch's variables itself, to the same numbers.
    within_srun = by_mpi and by_mpi.by == "srun" and "TORCHELASTIC_RUN_ID" in os.environ
    if by_mpi is None or by_torch.size > by_mpi.size or within_srun:
        return by_torch
    return by_mpi


def launched_for_mpi() -> Launched | None:
    """Return what launched this process, other than torch's launchers; None if nothing did."""
    return next(filter(None, (_place(*each) for each in VARIABLES.items())), None)


def certain_rank() -> int:
    """Return this process's rank among those of its launcher; 0 where there is none for certain.

    Only such a rank may leave it to the first one to print. Variables that are left over from
    another process would keep a process silent that was started alone.
    """
    found = launched()
    if found and found.by_torch and not {"LOCAL_RANK", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        found = launched_for_mpi()  # RANK and WORLD_SIZE alone may be a user's
    if found and found.by == "srun" and not _is_below(os.environ.get("SLURM_TASK_PID", "")):
        return 0
    return found.rank if found else 0


def _is_below(task: str) -> bool:
    """Tell whether this process is the one with the number `task`, or was started below it."""
    process = str(os.getpid())
    while process not in ("0", task):
        try:
            with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
                # the name before it, in parentheses, may hold anything
                process = file.read().rpartition(")")[2].split()[1]
        except (OSError, IndexError):
            return False
    return process == task


def _place(by: str, variables: tuple[str, str]) -> Launched | None:
    rank, size = (os.environ.get(variable, "") for variable in variables)
    if re.fullmatch("[0-9]+", rank) and re.fullmatch("[0-9]+", size):
        return Launched(by, int(rank), int(size))
    return None


def refusal(found: Launched, seen: int) -> str:
    """Return one line with a hint, for ranks that torch's launcher started without MPI.

    Args:
        found: torch's launcher.
        seen: the number of ranks in MPI's world.
    """
    sees = "each of them alone" if seen == 1 else f"a world of {seen}"
    return (
        f"{found.by} started {found.size} ranks (WORLD_SIZE={found.size}), "
        f"and MPI sees {sees}: start them with mpirun -n {found.size}; "
        "or in a loop of your own, call torch.distributed.init_process_group() first; "
        f"{left_over(found)}"
    )


def left_over(found: Launched) -> str:
    """Return a hint for a launcher's variables that come from elsewhere."""
    names = [name for pair in TORCH_VARIABLES for name in pair] if found.by_torch else []
    names = names or [*VARIABLES[found.by]]
    present = [name for name in dict.fromkeys(names) if name in os.environ]
    return f"where its variables are left over, unset {' '.join(present)}"


def launch_line(launcher: str, ranks: int) -> list[str]:
    """Return the words of the command line that starts ranks.

    Args:
        launcher: a shell command; `{ranks}` in it stands for their number. Empty: no launcher.
        ranks: how many to start.

    Raises:
        UserError: `launcher` cannot be parsed, or its program is not on the PATH.
    """
    try:
        line = [word.format(ranks=ranks) for word in shlex.split(launcher)]
    except (ValueError, KeyError, IndexError, AttributeError):
        raise UserError(f"--launcher {launcher}: write it as 'mpirun -n {{ranks}}'") from None
    if line and shutil.which(line[0]) is None:
        raise UserError(f"no {line[0]} on the PATH: activate the environment, or give --launcher")
    return line
