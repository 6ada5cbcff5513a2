"""swap-apptainer.sbatch on two nodes, with a stand-in for Apptainer, which Debian does not ship; the image is this host itself."""

from pathlib import Path

import pytest
from cluster_of_two import Cluster
from slurm_jobs import TESTS, complete, output, submit

QUICK = ("--set", "large_batch.epochs=1", "--set", "refine.epochs=1", "--set", "model.width=2")
SCRIPT = "slurm/swap-apptainer.sbatch"
CONTAINER = {"SWAP_CONTAINER": str(TESTS / "apptainer_stand_in"), "SWAP_IMAGE": "/"}


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_the_script_starts_its_ranks_through_the_container(
    cluster: Cluster, home: Path, launcher: str
) -> None:
    """In the image that make test-image builds, the same script runs behind that image's walls."""
    variables = CONTAINER | {"SWAP_LAUNCHER": launcher}
    job = submit(cluster, home, "digits", *QUICK, script=SCRIPT, variables=variables)
    result = complete(
        cluster, job, home / "runs" / "digits"
    )  # in the folder that sbatch was called in
    assert result["ranks"] == 4


def test_a_missing_image_gets_one_line(cluster: Cluster, home: Path) -> None:
    job = submit(cluster, home, "digits", script=SCRIPT)
    (ended,) = cluster.wait(job, 30)
    assert ended[
        "JobState"
    ] == "FAILED" and "name the image: SWAP_IMAGE=swap_hpc.sif sbatch ..." in output(ended)
