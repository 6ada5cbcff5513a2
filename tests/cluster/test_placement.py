"""Which rank runs where on two nodes, as `doctor` and a run's environment.json show it."""

import shutil
from pathlib import Path

import pytest
from cluster_of_two import Cluster
from launch import settings, swap_hpc
from slurm_jobs import complete, digest, places, submit

QUICK = settings("large_batch.epochs=2", "refine.epochs=2", "model.width=4")


def doctor(cluster: Cluster, *options: str) -> list[str]:
    """Return the lines of `doctor` on four ranks on two nodes."""
    srun = ("srun", "--mpi=pmix", "--nodes=2", "--ntasks=4", *options)
    return cluster.run(*srun, "swap-hpc", "doctor", "--groups", "2").splitlines()


def test_nodes_of_unequal_size(cluster: Cluster) -> None:
    lines = doctor(cluster, "--distribution=block")
    ranks = [line.partition(" -> cpu")[0] for line in lines if line.startswith("rank ")]
    assert ranks == [
        "rank 0 -> swap-n1, local rank 0",
        "rank 1 -> swap-n1, local rank 1",
        "rank 2 -> swap-n1, local rank 2",
        "rank 3 -> swap-n2, local rank 0",
    ]
    assert "grid: 4 ranks on 2 nodes, 2 groups" in lines
    assert [line for line in lines if line.startswith("PROBLEM")] == [
        "PROBLEM: a group spans nodes although a node has room for it: "
        "place consecutive ranks on one node (srun --distribution=block, mpirun --map-by slot)"
    ]


@pytest.mark.parametrize(
    ("options", "shown"),
    [(("--gpus-per-node=2",), 2), (("--gpus-per-task=1", "--ntasks-per-node=2"), 1)],
)
def test_gpus_all_shown_or_one_each(cluster: Cluster, options: tuple[str, ...], shown: int) -> None:
    """The batch scripts use the first options. tests/parallel chooses devices under both."""
    if not Path("/dev/tty7").exists():
        pytest.skip("no device files to stand for GPUs (/dev/tty0 to 7): Slurm shows none")
    lines = [line for line in doctor(cluster, *options) if line.startswith("rank ")]
    visible = [line.split("CUDA_VISIBLE_DEVICES=")[1].split(",") for line in lines]
    assert len(visible) == 4 and {len(each) for each in visible} == {shown}


def test_three_ranks_on_one_node_and_one_on_the_other_give_the_same_weights(
    cluster: Cluster, home: Path
) -> None:
    here, there = home / "here", home / "there"
    done = swap_hpc("train", "digits", *QUICK, "--phase", "large_batch", "--out", here, ranks=4)
    assert done.code == 0, done.stderr
    shutil.copytree(here, there)
    done = swap_hpc("train", "digits", *QUICK, "--out", here, ranks=4)
    assert done.code == 0, done.stderr
    options = ("--nodes=2", "--ntasks-per-node=3", "--gpus-per-node=3", "--cpus-per-task=1")
    (home / "hosts").write_text("swap-n1\nswap-n1\nswap-n1\nswap-n2\n")
    (home / "slurm" / "site.env").write_text(
        f"export SLURM_HOSTFILE={home}/hosts\n"
        'export SWAP_LAUNCHER_ARGS="--ntasks=4 --distribution=arbitrary"\n'
    )
    job = submit(cluster, home, "digits", *QUICK, "--out", there, options=options)
    complete(cluster, job, there)
    assert places(there) == [("swap-n1", 0), ("swap-n1", 1), ("swap-n1", 2), ("swap-n2", 0)]
    assert digest(there) == digest(here)
