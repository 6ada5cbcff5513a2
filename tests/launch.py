"""Starting real jobs: `mpirun` and the console command as a user does, with a time-out, leaving nothing behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Finished:
    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def ours(self) -> list[str]:
        """The lines on stderr that our program wrote: those of mpirun's banner and of warnings are not among them."""
        lines = [
            line.strip("\0") for line in self.stderr.splitlines()
        ]  # Open MPI ends its banner with a NUL
        return [line for line in lines if line.startswith("swap-hpc: ")]


def command(
    *arguments: str | Path,
    ranks: int | None = None,
    timeout: float = 120,
    cwd: Path | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Finished:
    """Runs a command, under `mpirun -n ranks` where `ranks` is given; kills all of it at the time-out."""
    begin = time.monotonic()
    process = launch(*arguments, ranks=ranks, cwd=cwd, variables=variables)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        raise AssertionError(
            f"{arguments} did not end within {timeout} s\n{stdout[-3000:]}\n{stderr[-3000:]}"
        ) from None
    return Finished(process.returncode, stdout, stderr, time.monotonic() - begin)


def launch(
    *arguments: str | Path,
    ranks: int | None = None,
    cwd: Path | None = None,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> "subprocess.Popen[str]":
    """Starts a command, in a session of its own."""
    line = [str(a) for a in arguments]
    if ranks is not None:
        line = [_mpirun(), "-n", str(ranks), *line]
    pipe, env = subprocess.PIPE, _environment() | dict(variables)
    return subprocess.Popen(
        line, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def swap_hpc(*arguments: str | Path, **how: Any) -> Finished:
    """`command` of the console script."""
    return command(BIN / "swap-hpc", *arguments, **how)


def processes_of(out: Path, within: float) -> list[int]:
    """Processes that were started into the folder `out` and still live after that many seconds."""
    deadline = time.monotonic() + within
    while True:
        alive = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and str(out).encode() in (
                    entry / "cmdline"
                ).read_bytes().split(b"\0"):
                    alive.append(int(entry.name))
            except OSError:
                continue  # it has just ended
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.2)


def ranks_of(job: "subprocess.Popen[str]") -> list[int]:
    """The processes of a job's ranks: those below its launcher that Python runs, in ascending order."""
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
            continue  # it has just ended
    return sorted(found)


def exit_codes(launcher: str) -> dict[str, str]:
    """A launcher's column of the README's table of exit codes: what happens -> the cell."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    head, _, *rows = re.findall(
        r"^\|(.*)\|$",
        readme.partition("\n## Nothing is lost\n")[2].partition("\n## ")[0],
        flags=re.MULTILINE,
    )
    column = [name.strip() for name in head.split("|")].index(launcher)
    return {row.split("|")[0].strip(): row.split("|")[column].strip() for row in rows}


def codes(cell: str) -> set[int]:
    """The codes of a cell: those before what it says of them."""
    return {int(code) for code in re.findall(r"\d+", re.split(":|, one|, its", cell)[0])}


@cache
def hydra() -> bool:
    """Whether `mpirun` is Hydra, of MPICH and its descendants, whose exit codes are not those of Open MPI's."""
    said = subprocess.run(
        [_mpirun(), "--version"], capture_output=True, text=True, env=_environment(), check=False
    )
    return "HYDRA" in said.stdout


def _mpirun() -> str:
    """The environment's own mpirun where it has one, as `make setup` decides."""
    own = BIN / "mpirun"
    found = str(own) if own.exists() else shutil.which("mpirun")
    assert found, "no mpirun: make setup"
    return found


def _environment() -> dict[str, str]:
    """Of a fresh shell: without what an MPI in this process left, and with leave to be root and to oversubscribe."""
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PRTE_", "PMI_"))
    }
    path = f"{BIN}:{clean['PATH']}"
    return clean | {
        "PATH": path,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
