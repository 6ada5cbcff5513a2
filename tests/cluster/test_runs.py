"""Whole runs by the batch scripts on two nodes: they give what plain `mpirun` gives."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster_of_two import ROOT, Cluster
from launch import swap_hpc
from safetensors.torch import load_file
from slurm_jobs import SMALL, commands, complete, digest, output, places, reached, submit

LAUNCHERS = ("srun", "mpirun")
QUICK = ("--set", "large_batch.epochs=2", "--set", "refine.epochs=2", "--set", "model.width=4")


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs with plain mpirun on this host, each made once: ranks, further arguments -> the folder."""
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
    """The site's settings, as a user makes them from the example."""
    text = (home / "slurm" / "site.env.example").read_text()
    (home / "slurm" / "site.env").write_text(
        "\n".join([text, f"export SWAP_LAUNCHER={launcher}", *lines, ""])
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_groups_of_one_rank_refine_and_average_as_under_plain_mpirun(
    cluster: Cluster, home: Path, launcher: str, plain: Callable[..., Path]
) -> None:
    """On two nodes of two ranks, from the same end of phase 1: the same weights, to the bit."""
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
    """A sum of two has one order: the whole run is the same, to the bit."""
    site(home, launcher)
    options = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
    out = home / "out"
    result = complete(
        cluster, submit(cluster, home, "digits", *QUICK, "--out", out, options=options), out
    )
    assert places(out) == [("swap-n1", 0), ("swap-n2", 0)]
    assert result["weights_sha256"] == digest(plain(2))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_groups_of_two_ranks_across_the_nodes(
    cluster: Cluster, home: Path, launcher: str, plain: Callable[..., Path]
) -> None:
    """Each group has a rank on both nodes. From the same end of phase 1 the same weights, to the bit: a sum of two has one order."""
    two_groups = ("--set", "groups=2")
    first = plain(4, *two_groups, "--phase", "large_batch")
    here, there = home / "here", home / "there"
    shutil.copytree(first, here)
    shutil.copytree(first, there)
    done = swap_hpc("train", "digits", *QUICK, *two_groups, "--out", here, ranks=4)
    assert done.code == 0, done.stderr
    site(
        home, launcher, 'export SWAP_LAUNCHER_ARGS="--map-by node"' if launcher == "mpirun" else ""
    )
    options = ("--nodes=2", *SMALL, "--distribution=cyclic")
    complete(
        cluster,
        submit(cluster, home, "digits", *QUICK, *two_groups, "--out", there, options=options),
        there,
    )
    assert [host for host, _ in places(there)] == [
        "swap-n1",
        "swap-n2",
        "swap-n1",
        "swap-n2",
    ]  # of groups 0, 0, 1, 1
    for file in ("group-000", "group-001"):
        mine, other = (
            load_file(there / f"{file}.safetensors"),
            load_file(here / f"{file}.safetensors"),
        )
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())
    assert digest(there) == digest(here)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_four_ranks_on_two_nodes_train_as_four_on_one(
    cluster: Cluster, home: Path, launcher: str, plain: Callable[..., Path]
) -> None:
    """MPI may sum in another order when nodes are between the ranks: a few steps give the same weights but for rounding."""
    few = (
        "--set",
        "large_batch.epochs=1",
        "--set",
        "refine.epochs=1",
        "--set",
        "large_batch.learning_rate=0.01",
    )
    site(home, launcher)
    out = home / "out"
    complete(cluster, submit(cluster, home, "digits", *QUICK, *few, "--out", out), out)
    mine, other = (
        load_file(out / "swap.safetensors"),
        load_file(plain(4, *few) / "swap.safetensors"),
    )
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5)


def test_an_array_of_jobs_gives_what_one_job_gives(
    cluster: Cluster, home: Path, plain: Callable[..., Path]
) -> None:
    """The three commands that stand in refine-array.sbatch, for digits; one group's job is stopped on its way, and requeues itself."""
    text = (home / "slurm" / "refine-array.sbatch").read_text()
    typed = commands(text, "sbatch --")
    assert len(typed) == 3
    out, longer = home / "out", ("--set", "refine.epochs=40")
    script = "set -e\n" + "\n".join(typed).replace(
        "cifar10 --data /data/cifar10", f"digits {' '.join((*QUICK, *longer))} --out {out}"
    )
    script = script.replace("0-7", "0-3").replace(
        "--parsable slurm", f"--parsable {' '.join(('--nodes=2', *SMALL))} slurm"
    )
    site(home, "srun", f"export SBATCH_OUTPUT={home}/%x-%A.out")
    done = cluster.run("bash", "-c", script + "\necho $first $groups", cwd=home)
    last = int(done.split("Submitted batch job ")[1].split()[0])
    first, groups = map(int, done.splitlines()[-1].split())
    reached(out, "group-003", 1)
    cluster.run("scancel", "--batch", "--signal=USR2", f"{groups}_3")
    result = complete(cluster, last, out)
    assert all(
        job["JobState"] == "COMPLETED" for number in (first, groups) for job in cluster.jobs(number)
    )
    assert sorted((job["ArrayTaskId"], job["Restarts"]) for job in cluster.jobs(groups)) == [
        ("0", "0"),
        ("1", "0"),
        ("2", "0"),
        ("3", "1"),
    ]
    assert {f"environment-group-{g:03d}.json" for g in range(4)} <= {p.name for p in out.iterdir()}
    assert result["weights_sha256"] == digest(plain(4, *longer))


def test_the_commands_of_the_readme(cluster: Cluster, home: Path) -> None:
    (command,) = commands((ROOT / "README.md").read_text(), "slurm/swap.sbatch digits")
    assert command.startswith("sbatch ")
    job = int(cluster.run("bash", "-c", command, cwd=home).split()[-1])
    result = complete(cluster, job, home / "runs" / "digits", 300)
    assert result["ranks"] == 8 and result["test_accuracy"]["averaged"] > 0.97
    assert output(cluster.jobs(job)[0]).count("**averaged (SWAP)**") == 1
