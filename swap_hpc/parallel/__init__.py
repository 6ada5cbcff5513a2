"""Ranks, devices and gradients: the only package that imports mpi4py and Horovod."""

import os

# Open MPI reads this variable when it starts. A rank, or Horovod's thread, that waits for others
# then yields its core instead of spinning on it: the model or another rank can use the core. It
# costs nothing where each rank has cores to itself; other MPI libraries ignore it.
os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
