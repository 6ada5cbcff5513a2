"""What a job leaves in `environment.json`: how it was started, where it runs, and its data."""

import sys
from pathlib import Path
from typing import Any

from swap_hpc.parallel.teams import Team
from swap_hpc.run.environment import environment
from swap_hpc.train.job import Job


def job_facts(job: Job, world: Team, node: Team) -> dict[str, Any]:
    """Return what a job leaves in `environment.json`; collective."""
    facts = environment(world, node, job.device)
    facts["command"] = [Path(sys.argv[0]).name, *sys.argv[1:]]
    facts["data"] = _facts(job)
    return facts


def _facts(job: Job) -> dict[str, Any]:
    """Return what a program needs to know of the training images to use the model."""
    dataset = job.dataset
    return {
        "classes": dataset.classes,
        "mean": dataset.mean,  # of each channel
        "std": dataset.std,  # of each channel
        "image_size": dataset.image_size,
        "samples": {name: len(split) for name, split in dataset.splits.items()},
    }
