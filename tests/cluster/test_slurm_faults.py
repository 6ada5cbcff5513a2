"""What happens to jobs on clusters: they come back, and end with the weights of a run that nothing happened to."""

from pathlib import Path

import pytest
from cluster_of_two import NODES, ROOT, Cluster, wait_for
from launch import processes_of
from slurm_jobs import TWO_NODES, complete, digest, output, reached, submit

from swap_hpc.recipe import SHIPPED

LAUNCHERS = ("srun", "mpirun")
# Long enough in both phases to be hit there: 30 epochs each, about 8 seconds
LONG = ("--set", "large_batch.epochs=30", "--set", "large_batch.stop_accuracy=1.0", "--set", "refine.epochs=24",
        "--set", "large_batch.learning_rate=[[0, 0.0], [4, 0.2], [30, 0.0]]")  # fmt: skip


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash that a run on this cluster ends with when it is left alone."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    complete(cluster, submit(cluster, ROOT, "digits", *LONG, "--out", out, options=(*TWO_NODES, f"--output={out}.txt")), out)
    return digest(out)


def restarted(cluster: Cluster, job: int, times: int) -> None:
    """Waits until the job has been put back into the queue so often, and runs again."""

    def again() -> bool:
        (state,) = cluster.jobs(job)
        return int(state["Restarts"]) >= times and state["JobState"] == "RUNNING"

    wait_for(again, f"restart {times} of job {job}", 90)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_survives_everything_one_after_the_other(cluster: Cluster, home: Path, launcher: str, undisturbed: str) -> None:
    """Requeued in phase 1, its step cancelled, requeued in phase 2, and a node lost: the first one or the second."""
    out = home / "out"
    variables = {"SWAP_LAUNCHER": launcher}
    job = submit(cluster, home, "digits", *LONG, "--out", out, variables=variables)
    reached(out, "world", 3)
    cluster.run("scontrol", "requeue", str(job))
    restarted(cluster, job, 1)
    reached(out, "world", 8)
    cluster.run("scancel", f"{job}.0")
    restarted(cluster, job, 2)
    reached(out, "group-003", 2)
    cluster.run("scontrol", "requeue", str(job))
    restarted(cluster, job, 3)
    reached(out, "group-003", 8)
    node = NODES[launcher == "srun"]  # mpirun runs on the first
    cluster.kill_node(node)
    wait_for(lambda: cluster.jobs(job)[0]["JobState"] != "RUNNING", f"job {job} to be taken off its lost node", 60)
    cluster.start_node(node)
    restarted(cluster, job, 4)
    assert complete(cluster, job, out)["weights_sha256"] == undisturbed
    said = output(cluster.jobs(job)[0])
    assert said.count("goes on") >= 4 and said.count("**averaged (SWAP)**") == 1
    assert "back into the queue, restart 2 of at most 20" in said  # by itself, after the step
    assert processes_of(out, 10) == []


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_time_limits_signal_saves_and_requeues(cluster: Cluster, home: Path, launcher: str, undisturbed: str) -> None:
    """A limit of one minute, and the signal 42 seconds before it."""
    out = home / "out"
    options = (*TWO_NODES, "--time=1", "--signal=B:USR1@42")
    job = submit(cluster, home, "digits", *LONG, "--out", out, options=options, variables={"SWAP_LAUNCHER": launcher})
    restarted(cluster, job, 1)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert complete(cluster, job, out)["weights_sha256"] == undisturbed
    said = output(cluster.jobs(job)[0])
    assert f"swap-hpc: stopped on request, all is saved in {out}: start it again to go on" in said
    assert "swap: stopped with code 75: back into the queue, restart 1 of at most 20" in said and "goes on" in said


def test_a_cancelled_job_stays_away_and_goes_on_when_it_is_submitted_again(cluster: Cluster, home: Path, undisturbed: str) -> None:
    out = home / "out"
    job = submit(cluster, home, "digits", *LONG, "--out", out)
    reached(out, "world", 3)
    cluster.run("scancel", str(job))
    (ended,) = cluster.wait(job, 30)
    assert ended["JobState"] == "CANCELLED" and ended["Restarts"] == "0"
    wait_for(lambda: "as the job was cancelled" in output(ended), "its last line", 30)
    assert processes_of(out, 20) == []
    again = submit(cluster, home, "digits", *LONG, "--out", out)
    assert complete(cluster, again, out)["weights_sha256"] == undisturbed and "large_batch goes on" in output(cluster.jobs(again)[0])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_restarts_are_bounded(cluster: Cluster, home: Path, launcher: str) -> None:
    out = home / "out"
    job = submit(cluster, home, "digits", *LONG, "--out", out, variables={"SWAP_LAUNCHER": launcher, "SWAP_RESTARTS": "0"})
    reached(out, "world", 3)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    (ended,) = cluster.wait(job, 30)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "75:0")
    assert "swap: stopped with code 75, and not restarted again after 0 restarts (SWAP_RESTARTS): submit the same command" in output(ended)


UNKNOWN = f"swap-hpc: {SHIPPED}/digits.toml: unknown field grups; valid here: "
WRONG = [
    ({}, ("digits", "--set", "grups=3"), "2:0", UNKNOWN),
    (
        {"SWAP_LAUNCHER": "mpirun"},
        ("digits", "--set", "grups=3"),
        "2:0",
        UNKNOWN,
    ),
    ({"SWAP_LAUNCHER": "aprun"}, ("digits",), "2:0", "swap: SWAP_LAUNCHER=aprun is not known: choose srun or mpirun"),
    ({"SWAP_MPI": "none"}, ("digits",), "2:0", "swap-hpc: srun started 4 ranks, but MPI sees a world of 1"),
    ({"VIRTUAL_ENV": "/nowhere", "PATH": "/usr/bin:/bin"}, ("digits",), "2:0", "swap: no swap-hpc on the PATH: make setup, or name"),
    ({"SWAP_MPI": "no_such"}, ("digits",), "1:0", "swap: stopped with code 1 before training began"),
]


@pytest.mark.parametrize(("variables", "arguments", "code", "says"), WRONG)
def test_what_a_restart_cannot_mend_fails_at_once(
    cluster: Cluster, home: Path, variables: dict[str, str], arguments: tuple[str, ...], code: str, says: str
) -> None:
    job = submit(cluster, home, *arguments, "--out", home / "out", variables=variables)
    (ended,) = cluster.wait(job, 60)
    said = output(ended)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", code, "0"), said
    assert sum(line.startswith(says) for line in said.splitlines()) == 1, said
    assert not list(home.glob(".swap-*"))
