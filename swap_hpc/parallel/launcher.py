"""Launchers of ranks: what they say of this process in environment variables, and what differs between them.

A rank and the number of ranks are read only to let one process speak before MPI is started (not at all on a login node), and to compare
with what MPI says: where an MPI library does not know its launcher, each process is a world of one.
"""

import os
import re
from typing import NamedTuple

VARIABLES = {
    "Open MPI's mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH's mpirun": ("PMI_RANK", "PMI_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
}

# Lets ranks outnumber cores, unbound, under the mpirun of Open MPI 4 and 5, which refuses that otherwise. MPICH's allows it and binds
# nothing; these names mean nothing to it, while it refuses Open MPI's options.
CROWDED = {
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "I_MPI_PIN": "off",
}

PARENT = os.getppid()  # when this process began


class Advice(NamedTuple):
    """What to tell the launchers of one family of MPI libraries."""

    srun: str  # Slurm's option that this library understands
    neighbours: str  # how mpirun places consecutive ranks on one node


def advice(library: str) -> Advice:
    """The launcher options for an MPI library, given its name and version, for example "MPICH 4.0.2"."""
    if library.startswith("Open MPI"):
        return Advice("--mpi=pmix", "mpirun --map-by slot")
    return Advice("--mpi=pmi2", "mpirun -ppn RANKS_OF_A_NODE")


class Launched(NamedTuple):
    by: str
    rank: int
    size: int


def launched() -> Launched | None:
    """None where the process was started alone, also where what is in the variables cannot be a launcher's."""
    for name, variables in VARIABLES.items():
        rank, size = (os.environ.get(variable, "") for variable in variables)
        if re.fullmatch("[0-9]+", rank) and re.fullmatch("[0-9]+", size):
            return Launched(name, int(rank), int(size))
    return None
