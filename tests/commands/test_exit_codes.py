"""Each row of the table of exit codes, under this environment's mpirun."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import (
    BIN,
    HANG,
    codes,
    exit_codes,
    hydra,
    launch,
    processes_of,
    ranks_of,
    settings,
    swap_hpc,
    wait_for,
)

ENDLESS = settings("large_batch.epochs=2", "refine.epochs=10000", "model.width=4")

LAUNCHER = f"{'MPICH' if hydra() else 'Open MPI'}'s `mpirun`"

pytestmark = pytest.mark.mpi


def to_the_ranks(number: int, job: "subprocess.Popen[str]") -> None:
    for rank in ranks_of(job):
        os.kill(rank, number)


def to_a_rank(number: int, job: "subprocess.Popen[str]") -> None:
    os.kill(ranks_of(job)[-1], number)


def to_mpirun(number: int, job: "subprocess.Popen[str]") -> None:
    os.kill(job.pid, number)


Sending = Callable[[int, "subprocess.Popen[str]"], None]
TO_ALL_RANKS = "SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 to all ranks"
CASES: list[tuple[str, Sending, int]] = [
    (TO_ALL_RANKS, to_the_ranks, signal.SIGTERM),
    (TO_ALL_RANKS, to_the_ranks, signal.SIGINT),
    (TO_ALL_RANKS, to_the_ranks, signal.SIGUSR1),
    (TO_ALL_RANKS, to_the_ranks, signal.SIGUSR2),
    ("SIGUSR1 to the launcher", to_mpirun, signal.SIGUSR1),
    ("SIGUSR2 to the launcher", to_mpirun, signal.SIGUSR2),
    ("SIGTERM or SIGINT to the launcher", to_mpirun, signal.SIGTERM),
    ("SIGTERM or SIGINT to the launcher", to_mpirun, signal.SIGINT),
    ("a rank is killed", to_a_rank, signal.SIGKILL),
    ("the launcher is killed", to_mpirun, signal.SIGKILL),
]


@pytest.mark.parametrize(
    ("row", "send", "number"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_the_launchers_code_is_that_of_the_table(
    row: str, send: Sending, number: int, tmp_path: Path
) -> None:
    out, state = tmp_path / "out", tmp_path / "state"
    cell = exit_codes(LAUNCHER)[row]
    line = ("train", "digits", *ENDLESS, "--out", str(out))
    job = launch(BIN / "swap-hpc", *line, ranks=2, variables={"SWAP_HPC_STATE": str(state)})
    try:
        wait_for(lambda: len(groups_of(checkpoints(out))) == 2, "checkpoints of two groups")
        send(number, job)
        output, errors = job.communicate(timeout=HANG)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    code = job.returncode if job.returncode >= 0 else 128 - job.returncode  # as a shell shows it
    assert code in codes(cell), errors
    assert processes_of(out, within=10) == []
    # The folder and the state file are right even where the launcher's code is not.
    assert not (out / "result.json").exists() and checkpoints(out)
    if "all is saved" in cell:
        assert state.read_text() == "stopped"
        assert f"swap-hpc: stopped on request, all is saved in {out}" in output


def checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints of the groups."""
    return list((out / "checkpoints").glob("group-*.safetensors"))


def groups_of(files: list[Path]) -> set[str]:
    """Return the groups ("group-000" ...) that have saved."""
    return {path.name[: len("group-000")] for path in files}


def test_a_job_that_ends_before_training_has_told_that_it_prepared(tmp_path: Path) -> None:
    """By this `launch.sh` knows a node that was lost in set-up, where mpirun returns 0."""
    state = tmp_path / "state"
    line = ("train", "no-such-recipe", "--out", tmp_path / "out")
    done = swap_hpc(*line, ranks=2, variables={"SWAP_HPC_STATE": str(state)})
    assert done.code == 2, done.stderr
    first, *then = state.read_text().splitlines()
    assert first == "preparing" and set(then) == {"failed with 2"}


def test_the_table_is_read() -> None:
    assert {row for row, _, _ in CASES} <= set(exit_codes(LAUNCHER))
