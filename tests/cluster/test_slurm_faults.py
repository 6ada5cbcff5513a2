"""What happens to jobs on clusters: they come back, and end with the weights of a run that nothing happened to."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster_of_two import NODES, ROOT, Cluster, wait_for
from launch import processes_of
from slurm_jobs import TWO_NODES, complete, digest, further, output, reached, read_lines, submit

from swap_hpc.recipe.loading import SHIPPED

LAUNCHERS = ("srun", "mpirun")
TIMED = (
    "--set",
    "large_batch.epochs=3",
    "--set",
    "large_batch.stop_accuracy=1.0",
    "--set",
    "refine.epochs=2",
)


@pytest.fixture(scope="session")
def lasting(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Fields of a run whose phases last about 14 and 26 seconds here, however fast this machine is: long enough to be hit in both."""
    out = tmp_path_factory.mktemp("timed") / "out"
    complete(
        cluster,
        submit(
            cluster,
            ROOT,
            "digits",
            *TIMED,
            "--out",
            out,
            options=(*TWO_NODES, f"--output={out}.txt"),
        ),
        out,
    )

    def epochs(part: str, seconds: float, least: int, most: int) -> int:
        last = [line for line in read_lines(out, part) if "train_seconds" in line][-1]
        return max(
            least, min(most, round(seconds / (last["train_seconds"] + last["evaluate_seconds"])))
        )

    first, refine = epochs("world", 14, 12, 90), epochs("group-000", 26, 10, 160)
    return (
        "--set", f"large_batch.epochs={first}", "--set", "large_batch.stop_accuracy=1.0", "--set", f"refine.epochs={refine}",
        "--set", f"large_batch.learning_rate=[[0, 0.0], [4, 0.2], [{first}, 0.0]]",
    )  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(
    cluster: Cluster, lasting: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The hash that it ends with on this cluster when it is left alone."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    complete(
        cluster,
        submit(
            cluster,
            ROOT,
            "digits",
            *lasting,
            "--out",
            out,
            options=(*TWO_NODES, f"--output={out}.txt"),
        ),
        out,
    )
    return digest(out)


def survives(cluster: Cluster, job: int, fault: Callable[[], object]) -> None:
    """Lets a fault happen, and waits until the job has been put back into the queue and runs again."""
    before = int(cluster.jobs(job)[0]["Restarts"])
    fault()

    def again() -> bool:
        (state,) = cluster.jobs(job)
        return int(state["Restarts"]) > before and state["JobState"] == "RUNNING"

    wait_for(again, f"restart {before + 1} of job {job}", 180)


def kill_a_rank(out: Path) -> None:
    ranks = [
        pid
        for pid in processes_of(out, 0)
        if b"swap-hpc" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[1]
    ]
    os.kill(ranks[-1], signal.SIGKILL)


def lose(cluster: Cluster, node: str, job: int) -> None:
    cluster.kill_node(node)
    wait_for(
        lambda: cluster.jobs(job)[0]["JobState"] != "RUNNING",
        f"job {job} to be taken off its lost node",
        120,
    )
    cluster.start_node(node)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_survives_everything_one_after_the_other(
    cluster: Cluster, home: Path, lasting: tuple[str, ...], launcher: str, undisturbed: str
) -> None:
    """A rank killed, requeued, its step cancelled, its second node lost, in phase 1; requeued and its first node lost, in phase 2."""
    out = home / "out"
    job = submit(
        cluster,
        home,
        "digits",
        *lasting,
        "--out",
        out,
        variables={"SWAP_LAUNCHER": launcher, "SWAP_RETRIES": "10"},
    )
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
        survives(
            cluster, job, lambda: lose(cluster, NODES[0], job)
        )  # it runs mpirun and the script
    assert complete(cluster, job, out)["weights_sha256"] == undisturbed
    said = output(cluster.jobs(job)[0])
    assert said.count("large_batch goes on") >= 5 and said.count("**averaged (SWAP)**") == 1
    if launcher == "srun":  # both times that it was requeued; mpirun leaves its ranks no time
        assert said.count(f"swap-hpc: stopped on request, all is saved in {out}") >= 2
    assert said.count(": back into the queue\n") >= 2  # by itself, after the rank and the step
    assert processes_of(out, 10) == [] and not list(home.glob(".swap-*"))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_time_limits_signal_saves_and_requeues(
    cluster: Cluster, home: Path, lasting: tuple[str, ...], launcher: str, undisturbed: str
) -> None:
    """A limit of one minute, and the signal 32 seconds before it, or some seconds earlier."""
    out = home / "out"
    options = (*TWO_NODES, "--time=1", "--signal=B:USR1@32")
    job = submit(
        cluster,
        home,
        "digits",
        *lasting,
        "--out",
        out,
        options=options,
        variables={"SWAP_LAUNCHER": launcher},
    )
    survives(cluster, job, lambda: None)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert complete(cluster, job, out)["weights_sha256"] == undisturbed
    said = output(cluster.jobs(job)[0])
    first, code, second = re.split(
        r"swap: stopped with code (\d+): back into the queue\n", said, maxsplit=1
    )
    if "digits: 4 ranks" in first:
        assert (
            code == "75"
            and f"swap-hpc: stopped on request, all is saved in {out}: start it again to go on"
            in said
        )
    else:
        assert code == "138", (
            said
        )  # on a crowded machine Python was still importing, and the signal ended it
    assert (
        "goes on" in second or "epoch   1/" not in first
    )  # a slow start may still have been at its beginning


def test_a_cancelled_job_stays_away_and_goes_on_when_it_is_submitted_again(
    cluster: Cluster, home: Path, lasting: tuple[str, ...], undisturbed: str
) -> None:
    out = home / "out"
    job = submit(cluster, home, "digits", *lasting, "--out", out)
    reached(out, "world", 3)
    cluster.run("scancel", str(job))
    (ended,) = cluster.wait(job, 120)
    assert ended["JobState"] == "CANCELLED" and ended["Restarts"] == "0"
    wait_for(
        lambda: "swap: stopped with code 75; the job is C" in output(ended), "its last line", 60
    )  # CANCELLED or COMPLETING
    assert processes_of(out, 20) == []
    again = submit(cluster, home, "digits", *lasting, "--out", out)
    assert complete(cluster, again, out)[
        "weights_sha256"
    ] == undisturbed and "large_batch goes on" in output(cluster.jobs(again)[0])


# Its last act, after MPI's end, is to wait for ever: then only the launcher ends it
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
    (ended,) = cluster.wait(job, 120)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0")
    assert (
        "swap: stopped with code 75; SWAP_RESTARTS=0 allows no further restart: submit the same command"
        in output(ended)
    )


UNKNOWN = f"swap-hpc: {SHIPPED}/digits.toml: unknown field grups; valid here: "
WRONG = [
    pytest.param({}, ("digits", "--set", "grups=3"), "2:0", UNKNOWN, marks=pytest.mark.mpi),
    (
        {"SWAP_LAUNCHER": "mpirun"},
        ("digits", "--set", "grups=3"),
        "2:0",
        UNKNOWN,
    ),
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
    """A loss that is not finite looks, to the script, like a lost neighbour: it is tried again, here once."""
    diverges = ("--set", "large_batch.learning_rate=1e30")
    job = submit(
        cluster, home, "digits", *diverges, "--out", home / "out", variables={"SWAP_RETRIES": "1"}
    )
    (ended,) = cluster.wait(job, 180)
    said = output(ended)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), said
    assert (
        said.count("swap-hpc: the loss is ") == 2
        and said.count("swap: stopped with code 3: back into the queue\n") == 1
    )
    assert (
        said.count(
            "swap: stopped with code 3; SWAP_RETRIES=1 allows no further retry: see the reason above"
        )
        == 1
    )
    assert not list(home.glob(".swap-*"))


@pytest.mark.parametrize(("variables", "arguments", "code", "says"), WRONG)
def test_what_a_restart_cannot_mend_fails_at_once(
    cluster: Cluster,
    home: Path,
    variables: dict[str, str],
    arguments: tuple[str, ...],
    code: str,
    says: str,
) -> None:
    job = submit(cluster, home, *arguments, "--out", home / "out", variables=variables)
    (ended,) = cluster.wait(job, 120)
    said = output(ended)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", code, "0"), said
    assert sum(line.startswith(says) for line in said.splitlines()) == 1, said
    assert not list(home.glob(".swap-*"))
