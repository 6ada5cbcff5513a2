"""Whole runs by the batch scripts on two nodes give what plain `mpirun` gives."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster_of_two import ROOT, Cluster
from launch import settings, swap_hpc
from safetensors.torch import load_file
from slurm_jobs import SMALL, commands, complete, digest, output, places, reached, submit

LAUNCHERS = ("srun", "mpirun")
QUICK = settings("large_batch.epochs=2", "refine.epochs=2", "model.width=4")


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that runs plain mpirun on this host, once for each list of arguments.

    It takes the number of ranks and further arguments, and returns the run's folder.
    """
    made: dict[tuple[Any, ...], Path] = {}

    def run(ranks: int, *arguments: str) -> Path:
        key = (ranks, *arguments)
        if key not in made:
            out = tmp_path_factory.mktemp("plain") / "run"
            done = swap_hpc("train", "digits", *QUICK, *arguments, "--out", out, ranks=ranks)
            assert done.code == 0, done.stderr
            made[key] = out
        return made[key]

    return run


def site(home: Path, launcher: str, *lines: str) -> None:
    """Write the site's settings, as a user makes them from the example."""
    example = (home / "slurm" / "site.env.example").read_text()
    text = "\n".join([example, f"export SWAP_LAUNCHER={launcher}", *lines, ""])
    (home / "slurm" / "site.env").write_text(text)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_groups_of_one_rank_refine_and_average_as_under_plain_mpirun(
    cluster: Cluster, home: Path, launcher: str, plain: Callable[..., Path]
) -> None:
    """On two nodes of two ranks, from the same end of phase 1: the same weights, bit for bit."""
    first = plain(4, "--phase", "large_batch")
    here, there = home / "here", home / "there"
    shutil.copytree(first, here)
    shutil.copytree(first, there)
    done = swap_hpc("train", "digits", *QUICK, "--out", here, ranks=4)
    assert done.code == 0 and "large_batch goes on at its end" in done.stdout, done.stderr
    site(home, launcher)
    result = complete(cluster, submit(cluster, home, "digits", *QUICK, "--out", there), there)
    assert places(there) == [("swap-n1", 0), ("swap-n1", 1), ("swap-n2", 0), ("swap-n2", 1)]
    assert result["weights_sha256"] == digest(here)


@pytest.mark.parametrize("launcher", [pytest.param("srun", marks=pytest.mark.mpi), "mpirun"])
def test_two_ranks_on_two_nodes_train_as_two_on_one(
    cluster: Cluster, home: Path, launcher: str, plain: Callable[..., Path]
) -> None:
    """A sum of two has only one order, so the whole run is the same, bit for bit."""
    site(home, launcher)
    options = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
    out = home / "out"
    job = submit(cluster, home, "digits", *QUICK, "--out", out, options=options)
    result = complete(cluster, job, out)
    assert places(out) == [("swap-n1", 0), ("swap-n2", 0)]
    assert result["weights_sha256"] == digest(plain(2))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_groups_of_two_ranks_across_the_nodes(
    cluster: Cluster, home: Path, launcher: str, plain: Callable[..., Path]
) -> None:
    """Each group has a rank on both nodes.

    From the same end of phase 1 they give the same weights, bit for bit, since a sum of two has
    only one order.
    """
    two_groups = settings("groups=2")
    first = plain(4, *two_groups, "--phase", "large_batch")
    here, there = home / "here", home / "there"
    shutil.copytree(first, here)
    shutil.copytree(first, there)
    done = swap_hpc("train", "digits", *QUICK, *two_groups, "--out", here, ranks=4)
    assert done.code == 0, done.stderr
    by_node = 'export SWAP_LAUNCHER_ARGS="--map-by node"'
    site(home, launcher, by_node if launcher == "mpirun" else "")
    options = ("--nodes=2", *SMALL, "--distribution=cyclic")
    job = submit(cluster, home, "digits", *QUICK, *two_groups, "--out", there, options=options)
    complete(cluster, job, there)
    # Ranks 0 and 1 are group 0, ranks 2 and 3 are group 1.
    assert [host for host, _ in places(there)] == ["swap-n1", "swap-n2", "swap-n1", "swap-n2"]
    for file in ("group-000", "group-001"):
        mine = load_file(there / f"{file}.safetensors")
        other = load_file(here / f"{file}.safetensors")
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
    assert digest(there) == digest(here)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_four_ranks_on_two_nodes_train_as_four_on_one(
    cluster: Cluster, home: Path, launcher: str, plain: Callable[..., Path]
) -> None:
    """A few steps give the same weights except for rounding.

    MPI may sum in another order when the ranks are on several nodes.
    """
    few = settings("large_batch.epochs=1", "refine.epochs=1", "large_batch.learning_rate=0.01")
    site(home, launcher)
    out = home / "out"
    complete(cluster, submit(cluster, home, "digits", *QUICK, *few, "--out", out), out)
    mine = load_file(out / "swap.safetensors")
    other = load_file(plain(4, *few) / "swap.safetensors")
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)


def test_an_array_of_jobs_gives_what_one_job_gives(
    cluster: Cluster, home: Path, plain: Callable[..., Path]
) -> None:
    """The three commands of refine-array.sbatch, for digits.

    One group's job is stopped on its way, and requeues itself.
    """
    text = (home / "slurm" / "refine-array.sbatch").read_text()
    typed = commands(text, "sbatch --")
    assert len(typed) == 3
    out, longer = home / "out", settings("refine.epochs=40")
    script = "\n".join(["set -e", *typed, "echo $first $groups"])
    for shipped, here in (
        ("cifar10 --data /data/cifar10", f"digits {' '.join((*QUICK, *longer))} --out {out}"),
        ("0-7", "0-3"),
        ("--parsable slurm", f"--parsable {' '.join(('--nodes=2', *SMALL))} slurm"),
    ):
        script = script.replace(shipped, here)
    site(home, "srun", f"export SBATCH_OUTPUT={home}/%x-%A.out")
    printed = cluster.run("bash", "-c", script, cwd=home)
    last = int(printed.split("Submitted batch job ")[1].split()[0])
    first, groups = map(int, printed.splitlines()[-1].split())
    reached(out, "group-003", 1)
    cluster.run("scancel", "--batch", "--signal=USR2", f"{groups}_3")
    result = complete(cluster, last, out)
    jobs = [*cluster.jobs(first), *cluster.jobs(groups)]
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}
    restarts = {job["ArrayTaskId"]: job["Restarts"] for job in cluster.jobs(groups)}
    assert restarts == {"0": "0", "1": "0", "2": "0", "3": "1"}
    assert {f"environment-group-{g:03d}.json" for g in range(4)} <= {p.name for p in out.iterdir()}
    assert result["weights_sha256"] == digest(plain(4, *longer))


def test_the_commands_of_the_readme(cluster: Cluster, home: Path) -> None:
    (command,) = commands((ROOT / "README.md").read_text(), "slurm/swap.sbatch digits")
    assert command.startswith("sbatch ")
    job = int(cluster.run("bash", "-c", command, cwd=home).split()[-1])
    result = complete(cluster, job, home / "runs" / "digits")
    assert result["ranks"] == 8 and result["test_accuracy"]["averaged"] > 0.97
    assert output(cluster.jobs(job)[0]).count("**averaged (SWAP)**") == 1
