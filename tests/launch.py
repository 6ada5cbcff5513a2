"""Start commands as a user does, with a time-out, and leave no process behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

BIN = Path(sys.executable).parent

HANG = 900  # seconds after which a command hangs: long, since no test may depend on a host's speed
# Open MPI does not start where a killed mpirun of the same process number left its files.
FRESH = 'rm -rf "${TMPDIR:-/tmp}/ompi.$$"; exec "$@"'
T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def ours(self) -> list[str]:
        """The lines on stderr that our program wrote, without mpirun's banner and warnings."""
        # Open MPI ends its banner with a NUL byte.
        lines = [line.strip("\0") for line in self.stderr.splitlines()]
        return [line for line in lines if line.startswith("swap-hpc: ")]


def command(
    *arguments: str | Path,
    ranks: int | None = None,
    timeout: float = HANG,
    cwd: Path | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Finished:
    """Run a command, under `mpirun -n ranks` where given; kill all of it at the time-out."""
    process = launch(*arguments, ranks=ranks, cwd=cwd, variables=variables)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # torchrun gives each rank a session of its own.
        ranks_below = ranks_of(process)
        os.killpg(process.pid, signal.SIGKILL)
        for rank in ranks_below:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(
            f"{arguments} did not end within {timeout} s\n{stdout[-3000:]}\n{stderr[-3000:]}"
        ) from None
    return Finished(process.returncode, stdout, stderr)


def launch(
    *arguments: str | Path,
    ranks: int | None = None,
    cwd: Path | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> "subprocess.Popen[str]":
    """Start a command in a new session."""
    line = [str(a) for a in arguments]
    if ranks is not None:
        line = ["sh", "-c", FRESH, "sh", _mpirun(), "-n", str(ranks), *line]
    pipe, env = subprocess.PIPE, _environment() | dict(variables)
    return subprocess.Popen(
        line, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def torchrun(ranks: int) -> tuple[str, ...]:
    """Return the words that start a Python file, or -m and a module, on ranks of torch's launcher.

    Each has a port of its own, so that several may run at the same time.
    """
    return (str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks))


def settings(*fields: str) -> tuple[str, ...]:
    """Return the options that set recipe fields, each written as `refine.epochs=1`."""
    return tuple(word for field in fields for word in ("--set", field))


def swap_hpc(*arguments: str | Path, **how: Any) -> Finished:
    """Run the console script as `command` does."""
    return command(BIN / "swap-hpc", *arguments, **how)


def wait_for(ready: Callable[[], T], what: str, every: float = 0.2) -> T:
    """Call `ready` every so many seconds until it returns something true, and return that."""
    deadline = time.monotonic() + HANG
    while not (value := ready()):
        assert time.monotonic() < deadline, f"no {what} within {HANG} s"
        time.sleep(every)
    return value


def processes_of(out: Path, within: float) -> list[int]:
    """Return the processes started into the folder `out` that still live after `within` seconds."""
    deadline = time.monotonic() + within
    while True:
        alive = [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and str(out).encode() in _arguments(entry)
        ]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.2)


def _arguments(process: Path) -> list[bytes]:
    """Return the command line of an entry of /proc; empty where the process has just ended."""
    try:
        return (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def ranks_of(job: "subprocess.Popen[str]") -> list[int]:
    """Return a job's ranks: the Python processes below its launcher, in ascending order."""
    found, below = [], [job.pid]
    while below:
        pid = below.pop()
        try:
            children = [
                int(child)
                for file in Path(f"/proc/{pid}/task").glob("*/children")
                for child in file.read_text().split()
            ]
            below += children
            if pid != job.pid and Path(f"/proc/{pid}/exe").readlink().name.startswith("python"):
                found.append(pid)
        except OSError:
            continue  # the process has just ended
    return sorted(found)


def exit_codes(launcher: str) -> dict[str, str]:
    """Return a launcher's column of the table of exit codes: what happens -> the cell."""
    page = (Path(__file__).parents[1] / "slurm" / "README.md").read_text(encoding="utf-8")
    section = page.partition("\n## Exit codes\n")[2].partition("\n## ")[0]
    head, _, *rows = re.findall(r"^\|(.*)\|$", section, flags=re.MULTILINE)
    column = [name.strip() for name in head.split("|")].index(launcher)
    return {row.split("|")[0].strip(): row.split("|")[column].strip() for row in rows}


def codes(cell: str) -> set[int]:
    """Return the codes of a cell, without the numbers in its explanation."""
    return {int(code) for code in re.findall(r"\d+", re.split(":|, one|, its", cell)[0])}


@cache
def hydra() -> bool:
    """Return whether `mpirun` is Hydra, that of MPICH; its exit codes differ from Open MPI's."""
    line = [_mpirun(), "--version"]
    version = subprocess.run(line, capture_output=True, text=True, env=_environment(), check=False)
    return "HYDRA" in version.stdout


def _mpirun() -> str:
    """Return the environment's own mpirun where it has one, else the one on the PATH."""
    own = BIN / "mpirun"
    found = str(own) if own.exists() else shutil.which("mpirun")
    assert found, "no mpirun: make setup"
    return found


def _environment() -> dict[str, str]:
    """Return a fresh shell's variables, with permission to be root and to oversubscribe cores.

    Variables that MPI or torch's launcher set in this process would confuse the job.
    """
    others = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return clean | {
        "PATH": f"{BIN}:{clean['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
