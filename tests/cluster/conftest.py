"""One cluster for all tests of this folder, which are skipped where Slurm is not installed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_of_two import INSTALL, MPI_TYPE, Cluster, missing, running
from slurm_jobs import user_folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(f"no Slurm cluster can be started here: {why}")
    with running(tmp_path_factory.mktemp("cluster")) as started:
        if MPI_TYPE not in started.run("srun", "--mpi=list"):
            pytest.skip(f"this srun has no MPI type {MPI_TYPE}: {INSTALL}")
        yield started


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return user_folder(tmp_path)
