"""What a job has to do, where and with what, for the modules that resume, record and loop."""

from dataclasses import dataclass
from pathlib import Path

from swap_hpc.parallel.grid import Ranks
from swap_hpc.recipe.phase import Part
from swap_hpc.run.checkpoint import Checkpoints
from swap_hpc.run.display import Display
from swap_hpc.train.job import Job


@dataclass(frozen=True)
class Assignment:
    """One job's share of a run."""

    job: Job
    ranks: Ranks
    out: Path  # the run's folder
    chosen: Part | None  # the part of the run that this job does; None is the whole run
    checkpoints: Checkpoints
    display: Display
