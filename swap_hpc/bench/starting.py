"""`start`: from launch to the first step, beside `import torch` on as many ranks."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from swap_hpc.bench.measure import Comparison, alternately
from swap_hpc.errors import RunError
from swap_hpc.parallel.launcher import CROWDED, launch_line
from swap_hpc.parallel.teams import Team

RANKS = 4
ONE_STEP = (
    "large_batch.epochs=1",
    "large_batch.batch_size=1196",
    "refine.epochs=0",
    "evaluate.batch_size=599",
    "checkpoint.epochs=0",
)


def start(world: Team, peers: ModuleType) -> list[Comparison]:
    """Ours goes on to the line of an epoch of one step, its evaluation and the first save included."""
    mpirun = launch_line(os.environ["SWAP_HPC_BENCH_LAUNCHER"], RANKS)

    def ours() -> float:
        with tempfile.TemporaryDirectory() as out:
            fields = [word for field in ONE_STEP for word in ("--set", field)]
            command = [
                *mpirun,
                sys.executable,
                "-m",
                "swap_hpc",
                "train",
                "digits",
                "--out",
                str(Path(out) / "run"),
                *fields,
            ]
            return _seconds_until(command, "large_batch  epoch   1/1")

    def torch_alone() -> float:
        return _seconds_until(
            [*mpirun, sys.executable, "-c", "import torch; print('imported', flush=True)"],
            "imported",
        )

    one, other = alternately(ours, torch_alone)
    what = (
        f"swap-hpc train to its first step, {RANKS} ranks on {len(os.sched_getaffinity(0))} cores"
    )
    return [
        Comparison(
            "start",
            what,
            "import torch",
            "s",
            one,
            other,
            8.0,
            at_most=True,
            difference=True,
            note="the difference counts",
        )
    ]


def _seconds_until(command: Sequence[str], text: str) -> float:
    """From the launch to the first line that holds `text`; then to the end, uncounted."""
    launcher = (
        "OMPI_",
        "PMIX_",
        "PRTE_",
        "PMI_",
        "HYDI_",
        *(() if command[0] == "srun" else ("SLURM_",)),
    )
    settings = ("OMPI_MCA_", "PRTE_MCA_", "OMPI_ALLOW_")
    own = {
        k: v for k, v in os.environ.items() if not k.startswith(launcher) or k.startswith(settings)
    }
    inherited = CROWDED | own  # Open MPI's launcher keeps its settings from what it starts
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", env=inherited)
    assert process.stdout is not None
    seconds = next((time.perf_counter() - begin for line in process.stdout if text in line), None)
    process.communicate()
    if seconds is None:
        raise RunError(
            f"{' '.join(command)} ended with {process.returncode} before it said {text!r}"
        )
    return seconds
