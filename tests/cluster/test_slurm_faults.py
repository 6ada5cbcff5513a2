"""Faults of jobs on a cluster: jobs come back, and end with the weights of an undisturbed run."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_of_two import NODES, ROOT, Cluster
from launch import processes_of, settings, wait_for
from slurm_jobs import TWO_NODES, complete, digest, further, output, reached, read_lines, submit

from swap_hpc.recipe.loading import SHIPPED

LAUNCHERS = ("srun", "mpirun")
TIMED = settings("large_batch.epochs=3", "large_batch.stop_accuracy=1.0", "refine.epochs=2")


def run_from_checkout(cluster: Cluster, fields: tuple[str, ...], out: Path) -> None:
    """Run digits as a job of this checkout's own script, and wait for its end."""
    options = (*TWO_NODES, f"--output={out}.txt")
    job = submit(cluster, ROOT, "digits", *fields, "--out", out, options=options)
    complete(cluster, job, out)


@pytest.fixture(scope="session")
def lasting(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options of a run whose phases last about 14 and 26 seconds on this machine.

    That is long enough to be hit by several faults in both.
    """
    out = tmp_path_factory.mktemp("timed") / "out"
    run_from_checkout(cluster, TIMED, out)

    def epochs(part: str, seconds: float, least: int, most: int) -> int:
        last = [line for line in read_lines(out, part) if "train_seconds" in line][-1]
        per_epoch = last["train_seconds"] + last["evaluate_seconds"]
        return max(least, min(most, round(seconds / per_epoch)))

    first = epochs("world", 14, 12, 90)
    return settings(
        f"large_batch.epochs={first}",
        f"large_batch.learning_rate=[[0, 0.0], [4, 0.2], [{first}, 0.0]]",
        "large_batch.stop_accuracy=1.0",
        f"refine.epochs={epochs('group-000', 26, 10, 160)}",
    )


@pytest.fixture(scope="session")
def undisturbed(
    cluster: Cluster, lasting: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The hash of this run's weights where nothing happens to it."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run_from_checkout(cluster, lasting, out)
    return digest(out)


def survives(cluster: Cluster, job: int, fault: Callable[[], object]) -> None:
    """Cause a fault, and wait until the job has been requeued and runs again."""
    before = int(cluster.jobs(job)[0]["Restarts"])
    fault()

    def again() -> bool:
        (state,) = cluster.jobs(job)
        return int(state["Restarts"]) > before and state["JobState"] == "RUNNING"

    wait_for(again, f"restart {before + 1} of job {job}")


def kill_a_rank(out: Path) -> None:
    ranks = [pid for pid in processes_of(out, 0) if b"swap-hpc" in program_of(pid)]
    os.kill(ranks[-1], signal.SIGKILL)


def program_of(pid: int) -> bytes:
    """Return the script that a Python process runs."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1]


def lose(cluster: Cluster, node: str, job: int) -> None:
    """Kill a node on which a job runs, and boot it again once the job has left it."""
    cluster.kill_node(node)

    def has_left() -> bool:
        return cluster.jobs(job)[0]["JobState"] != "RUNNING"

    wait_for(has_left, f"job {job} to be taken off its lost node")
    cluster.start_node(node)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_survives_everything_one_after_the_other(
    cluster: Cluster, home: Path, lasting: tuple[str, ...], launcher: str, undisturbed: str
) -> None:
    """Faults in phase 1: a killed rank, a requeue, a cancelled step, the loss of the second node.

    Faults in phase 2: a requeue, the loss of the first node. Each launcher loses one node.
    """
    out = home / "out"
    variables = {"SWAP_LAUNCHER": launcher, "SWAP_RETRIES": "10"}
    job = submit(cluster, home, "digits", *lasting, "--out", out, variables=variables)
    reached(out, "world", 2)
    survives(cluster, job, lambda: kill_a_rank(out))
    further(out, "world", 2)
    survives(cluster, job, lambda: cluster.run("scontrol", "requeue", str(job)))
    further(out, "world", 2)
    survives(cluster, job, lambda: cluster.run("scancel", f"{job}.0"))
    if launcher == "srun":
        further(out, "world", 2)
        survives(cluster, job, lambda: lose(cluster, NODES[1], job))
    reached(out, "group-003", 2)
    survives(cluster, job, lambda: cluster.run("scontrol", "requeue", str(job)))
    if launcher == "mpirun":
        further(out, "group-003", 2)
        # The first node runs mpirun and the script.
        survives(cluster, job, lambda: lose(cluster, NODES[0], job))
    assert complete(cluster, job, out)["weights_sha256"] == undisturbed
    printed = output(cluster.jobs(job)[0])
    assert printed.count("large_batch goes on") >= 5
    assert printed.count("**averaged (SWAP)**") == 1
    if launcher == "srun":
        # After each of the two requeues. mpirun leaves its ranks no time to save.
        assert printed.count(f"swap-hpc: stopped on request, all is saved in {out}") >= 2
    # The script requeued its job after the killed rank and after the cancelled step.
    assert printed.count(": back into the queue\n") >= 2
    assert "waiting for a sign of life" not in printed  # of itself, before it was requeued
    assert processes_of(out, 10) == [] and not list(home.glob(".swap-*"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_time_limits_signal_saves_and_requeues(
    cluster: Cluster, home: Path, lasting: tuple[str, ...], launcher: str, undisturbed: str
) -> None:
    """The limit is one minute. Slurm sends the signal 32 seconds before it or somewhat earlier."""
    out = home / "out"
    options = (*TWO_NODES, "--time=1", "--signal=B:USR1@32")
    variables = {"SWAP_LAUNCHER": launcher}
    line = ("digits", *lasting, "--out", str(out))
    job = submit(cluster, home, *line, options=options, variables=variables)
    survives(cluster, job, lambda: None)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert complete(cluster, job, out)["weights_sha256"] == undisturbed
    printed = output(cluster.jobs(job)[0])
    requeued = r"swap: stopped with code (\d+): back into the queue\n"
    first, code, second = re.split(requeued, printed, maxsplit=1)
    if "digits: 4 ranks" in first:
        assert code == "75"
        saved = f"swap-hpc: stopped on request, all is saved in {out}: start it again to go on"
        assert saved in printed
    else:
        # On a crowded machine Python was still importing, and the signal ended it.
        assert code == "138", printed
    # A slow start may not have completed an epoch before the signal.
    assert "goes on" in second or "epoch   1/" not in first


def test_a_cancelled_job_stays_away_and_goes_on_when_it_is_submitted_again(
    cluster: Cluster, home: Path, lasting: tuple[str, ...], undisturbed: str
) -> None:
    out = home / "out"
    job = submit(cluster, home, "digits", *lasting, "--out", out)
    reached(out, "world", 3)
    cluster.run("scancel", str(job))
    (ended,) = cluster.wait(job)
    assert ended["JobState"] == "CANCELLED" and ended["Restarts"] == "0"
    last_line = "swap: stopped with code 75; the job is C"  # CANCELLED or COMPLETING
    wait_for(lambda: last_line in output(ended), "the job's last line")
    assert processes_of(out, 20) == []
    again = submit(cluster, home, "digits", *lasting, "--out", out)
    assert complete(cluster, again, out)["weights_sha256"] == undisturbed
    assert "large_batch goes on" in output(cluster.jobs(again)[0])


# A rank that waits for ever after MPI has ended, so that only its launcher ends it.
SLOW_TO_LEAVE = """
import ctypes, os

if os.environ.get("PMIX_RANK", "0") != "0":
    libc = ctypes.CDLL(None)
    libc["__cxa_atexit"](libc.pause, None, None)
"""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_restarts_are_bounded_and_ranks_may_be_slow_to_leave(
    cluster: Cluster, home: Path, lasting: tuple[str, ...], launcher: str
) -> None:
    out = home / "out"
    (home / "sitecustomize.py").write_text(SLOW_TO_LEAVE)
    variables = {"SWAP_LAUNCHER": launcher, "SWAP_RESTARTS": "0", "PYTHONPATH": str(home)}
    job = submit(cluster, home, "digits", *lasting, "--out", out, variables=variables)
    reached(out, "world", 3)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    (ended,) = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0")
    bounded = "SWAP_RESTARTS=0 allows no further restart: submit the same command"
    assert f"swap: stopped with code 75; {bounded}" in output(ended)


UNKNOWN = f"swap-hpc: {SHIPPED}/digits.toml: unknown field grups; valid here: "
UNKNOWN_FIELD = ("digits", "--set", "grups=3")
WRONG = [
    pytest.param({}, UNKNOWN_FIELD, "2:0", UNKNOWN, marks=pytest.mark.mpi),
    ({"SWAP_LAUNCHER": "mpirun"}, UNKNOWN_FIELD, "2:0", UNKNOWN),
    (
        {"SWAP_LAUNCHER": "aprun"},
        ("digits",),
        "2:0",
        "swap: SWAP_LAUNCHER=aprun is not known: choose srun or mpirun",
    ),
    (
        {"SWAP_MPI": "none"},
        ("digits",),
        "2:0",
        "swap-hpc: srun started 4 ranks, but MPI sees a world of 1",
    ),
    (
        {"VIRTUAL_ENV": "/nowhere", "PATH": "/usr/bin:/bin"},
        ("digits",),
        "2:0",
        "swap: no swap-hpc on the PATH: make setup, or name",
    ),
    (
        {"SWAP_MPI": "no_such"},
        ("digits",),
        "1:0",
        "swap: stopped with code 1 before training began",
    ),
]


def test_a_run_that_fails_is_not_tried_for_ever(cluster: Cluster, home: Path) -> None:
    """The script cannot tell a loss that is not finite from a lost neighbour, and tries again.

    Here it may do so once.
    """
    diverges = settings("large_batch.learning_rate=1e30")
    line = ("digits", *diverges, "--out", str(home / "out"))
    job = submit(cluster, home, *line, variables={"SWAP_RETRIES": "1"})
    (ended,) = cluster.wait(job)
    printed = output(ended)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), printed
    assert printed.count("swap-hpc: the loss is ") == 2
    assert printed.count("swap: stopped with code 3: back into the queue\n") == 1
    bounded = "SWAP_RETRIES=1 allows no further retry: see the reason above"
    assert printed.count(f"swap: stopped with code 3; {bounded}") == 1
    assert not list(home.glob(".swap-*"))


@pytest.mark.parametrize(("variables", "arguments", "code", "message"), WRONG)
def test_what_a_restart_cannot_fix_fails_at_once(
    cluster: Cluster,
    home: Path,
    variables: dict[str, str],
    arguments: tuple[str, ...],
    code: str,
    message: str,
) -> None:
    job = submit(cluster, home, *arguments, "--out", home / "out", variables=variables)
    (ended,) = cluster.wait(job)
    printed = output(ended)
    state = (ended["JobState"], ended["ExitCode"], ended["Restarts"])
    assert state == ("FAILED", code, "0"), printed
    assert sum(line.startswith(message) for line in printed.splitlines()) == 1, printed
    assert not list(home.glob(".swap-*"))
