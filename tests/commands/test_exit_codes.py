"""The table of exit codes: each row of it, made to happen under this environment's mpirun."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import BIN, codes, exit_codes, hydra, launch, processes_of, ranks_of

ENDLESS = (
    "--set",
    "large_batch.epochs=2",
    "--set",
    "refine.epochs=10000",
    "--set",
    "model.width=4",
)

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
CASES: list[tuple[str, Sending, int]] = [
    *(("SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 to all ranks", to_the_ranks, number) for number in
      (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)),
    ("SIGUSR1 to the launcher", to_mpirun, signal.SIGUSR1),
    ("SIGUSR2 to the launcher", to_mpirun, signal.SIGUSR2),
    *(("SIGTERM or SIGINT to the launcher", to_mpirun, number) for number in (signal.SIGTERM, signal.SIGINT)),
    ("a rank is killed", to_a_rank, signal.SIGKILL),
    ("the launcher is killed", to_mpirun, signal.SIGKILL),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "send", "number"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_the_launchers_code_is_that_of_the_table(
    row: str, send: Sending, number: int, tmp_path: Path
) -> None:
    out, state = tmp_path / "out", tmp_path / "state"
    cell = exit_codes(LAUNCHER)[row]
    job = launch(
        BIN / "swap-hpc",
        "train",
        "digits",
        *ENDLESS,
        "--out",
        out,
        ranks=2,
        variables={"SWAP_HPC_STATE": str(state)},
    )
    try:
        _wait(
            lambda: (
                len({path.name[:9] for path in (out / "checkpoints").glob("group-*.safetensors")})
                == 2
            )
        )
        send(number, job)
        output, errors = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    code = job.returncode if job.returncode >= 0 else 128 - job.returncode  # as a shell tells it
    assert code in codes(cell), errors
    assert processes_of(out, within=10) == []
    # what tells the truth where the code does not
    assert not (out / "result.json").exists() and list(
        (out / "checkpoints").glob("group-*.safetensors")
    )
    if "all is saved" in cell:
        assert (
            state.read_text() == "stopped"
            and f"swap-hpc: stopped on request, all is saved in {out}" in output
        )


def test_the_table_is_read() -> None:
    assert {row for row, _, _ in CASES} <= set(exit_codes(LAUNCHER))


def _wait(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
