"""What the launcher says of this process: its rank and the number of ranks, from environment variables.

Only to let one process speak before MPI is started (not at all on a login node), and to compare with what MPI says: where
an MPI library does not know its launcher, each process is a world of one.
"""

import os
from typing import NamedTuple

VARIABLES = {
    "Open MPI's mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "MPICH's mpirun": ("PMI_RANK", "PMI_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
}

PARENT = os.getppid()  # when this process began


class Launched(NamedTuple):
    by: str
    rank: int
    size: int


def launched() -> Launched | None:
    """None where the process was started alone."""
    for name, (rank, size) in VARIABLES.items():
        if rank in os.environ and size in os.environ:
            return Launched(name, int(os.environ[rank]), int(os.environ[size]))
    return None
