"""`start`: from the launch to the first step, beside `import torch` on as many ranks."""

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
from swap_hpc.recipe.wording import count

RANKS = 4
# A run of one step: `digits` has 1,198 training and 599 test images.
ONE_STEP = (
    "large_batch.epochs=1",
    "large_batch.batch_size=1196",
    "refine.epochs=0",
    "evaluate.batch_size=599",
    "checkpoint.epochs=0",
)
# Variables that a launcher gives its ranks, by their beginnings, and a user's own among them.
LAUNCHERS = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "HYDI_")
SETTINGS = ("OMPI_MCA_", "PRTE_MCA_", "OMPI_ALLOW_")


def start(world: Team, peers: ModuleType) -> list[Comparison]:
    """Compare the time to the line of a run's only epoch with that of importing torch.

    The line follows the step, its evaluation and the first save.
    """
    mpirun = launch_line(os.environ["SWAP_HPC_BENCH_LAUNCHER"], RANKS)
    train = [*mpirun, sys.executable, "-m", "swap_hpc", "train", "digits"]
    fields = [word for field in ONE_STEP for word in ("--set", field)]
    imports = [*mpirun, sys.executable, "-c", "import torch; print('imported', flush=True)"]

    def ours() -> float:
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "run")
            return _seconds_until([*train, "--out", out, *fields], "large_batch  epoch   1/1")

    def torch_alone() -> float:
        return _seconds_until(imports, "imported")

    ours_seconds, torch_seconds = alternately(ours, torch_alone)
    cores = len(os.sched_getaffinity(0))
    return [
        Comparison(
            bench="start",
            what=f"swap-hpc train to its first step, {RANKS} ranks on {count(cores, 'core')}",
            peer="import torch",
            unit="s",
            ours=ours_seconds,
            peers=torch_seconds,
            bar=8.0,
            at_most=True,
            difference=True,
            note="the difference counts",
        )
    ]


def _seconds_until(command: Sequence[str], text: str) -> float:
    """Run a command to its end, and return the seconds until it prints a line with `text`.

    Raises:
        RunError: it prints no such line.
    """
    # Open MPI's launcher does not pass its own settings on to its ranks: set them again.
    variables = CROWDED | _without_launcher(command[0])
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", env=variables)
    assert process.stdout is not None
    seconds = next((time.perf_counter() - begin for line in process.stdout if text in line), None)
    process.communicate()
    if seconds is None:
        line = " ".join(command)
        raise RunError(
            f"{line} ended with exit code {process.returncode} and did not print {text!r}"
        )
    return seconds


def _without_launcher(launcher: str) -> dict[str, str]:
    """Return this process's variables without those of the launcher that started it.

    A launcher that inherits them takes itself for a rank. Open MPI's settings stay, and under srun
    the job's.
    """
    given = LAUNCHERS if launcher == "srun" else (*LAUNCHERS, "SLURM_")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(given) or name.startswith(SETTINGS)
    }
