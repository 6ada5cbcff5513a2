"""The first lines of a run: what is trained, on what and by how many."""

from pathlib import Path

from swap_hpc.data import Arrays, Batches, Dataset
from swap_hpc.data.normalisation import normalisation_line
from swap_hpc.parallel.grid import Ranks
from swap_hpc.recipe.wording import count
from swap_hpc.train.job import Job


def introduction(job: Job, ranks: Ranks, out: Path) -> list[str]:
    """Return the lines that a person sees first: the size of the job, and notes of the data."""
    recipe, device, data = job.recipe, job.device, job.dataset
    world = ranks.world
    is_in_memory = isinstance(data.train, Arrays)
    where = "in memory" if is_in_memory else "read and decoded in every epoch"
    if isinstance(data.train, Batches):
        where = f"made by {recipe.data.name}"
    lines = [
        f"{recipe.name}: {count(world.size, 'rank')}, {count(recipe.groups, 'group')}, "
        f"{device.name}, {count(device.threads, 'thread')} per rank, {recipe.precision}; "
        f"{_sizes(data)} {data.noun}, {where}; into {out}"
    ]
    lines += data.notes
    lines += normalisation_line(data, recipe.data)
    if device.is_shared(world):
        lines.append(
            "ranks share a GPU: gradients go through host memory "
            "(in Slurm, --ntasks-per-node as large as --gpus-per-node gives each rank one)"
        )
    return lines


def _sizes(data: Dataset) -> str:
    """Return the numbers of samples: "1,198 training and 599 test"."""
    words = {"train": "training", "validation": "validation", "test": "test"}
    *parts, last = (f"{len(split):,} {words[name]}" for name, split in data.splits.items())
    return f"{', '.join(parts)} and {last}"
