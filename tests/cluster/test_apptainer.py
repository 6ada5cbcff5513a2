"""swap-apptainer.sbatch on two nodes, with a stand-in for Apptainer, which Debian does not ship.

The image is this host itself.
"""

from pathlib import Path

import pytest
from cluster_of_two import Cluster
from launch import settings
from slurm_jobs import TESTS, complete, output, submit

QUICK = settings("large_batch.epochs=1", "refine.epochs=1", "model.width=2")
SCRIPT = "slurm/swap-apptainer.sbatch"
CONTAINER = {"SWAP_CONTAINER": str(TESTS / "apptainer_stand_in"), "SWAP_IMAGE": "/"}


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_the_script_starts_its_ranks_through_the_container(
    cluster: Cluster, home: Path, launcher: str
) -> None:
    """tests/image runs the same script with the image that it builds."""
    variables = CONTAINER | {"SWAP_LAUNCHER": launcher}
    job = submit(cluster, home, "digits", *QUICK, script=SCRIPT, variables=variables)
    out = home / "runs" / "digits"  # in the folder that sbatch was called in
    result = complete(cluster, job, out)
    assert result["ranks"] == 4


def test_a_missing_image_gets_one_line(cluster: Cluster, home: Path) -> None:
    job = submit(cluster, home, "digits", script=SCRIPT)
    (ended,) = cluster.wait(job)
    assert ended["JobState"] == "FAILED"
    assert "name the image: SWAP_IMAGE=swap_hpc.sif sbatch ..." in output(ended)
