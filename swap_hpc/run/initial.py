"""The weights that a run begins with, where its recipe names some."""

from pathlib import Path

from torch import nn

from swap_hpc.errors import UserError
from swap_hpc.parallel.grid import first_then_rest
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.inputs import Model
from swap_hpc.recipe.phase import PHASE_1
from swap_hpc.run.checkpoint import Checkpoints
from swap_hpc.run.fitting import load_foreign_
from swap_hpc.run.folder import phase_1_is_over
from swap_hpc.run.state_dicts import read_state_dict
from swap_hpc.run.weights import load_weights_
from swap_hpc.train.job import Job
from swap_hpc.train.pretrained import pretrained


def begin_with_weights_(
    model: nn.Module, job: Job, out: Path, checkpoints: Checkpoints, world: Team
) -> list[str]:
    """Give a model the weights that its recipe names, where nothing is saved yet; collective.

    A run that goes on has what it needs in its own folder: the file may be gone.

    Args:
        model: as its builder made it; changed in place.
        job: the run's.
        out: the run's folder.
        checkpoints: the run's.
        world: all ranks of the job.

    Returns:
        Lines that tell a person what was taken from where.

    Raises:
        UserError: on all ranks, the weights cannot be used.
    """
    settings = job.recipe.model
    if not (settings.weights or settings.has_library_weights):
        return []
    if world.any(checkpoints.holds(PHASE_1)):
        return []
    if not job.recipe.large_batch.epochs and phase_1_is_over(out, world):
        # Phase 1 without epochs has no checkpoint, but leaves the model that it was given.
        world.agree(lambda: load_weights_(model, out / f"{PHASE_1.name}.safetensors"))
        return []
    if settings.has_library_weights:
        return _load_pretrained_(model, job, world)
    return world.agree(lambda: _load_file_(model, settings))


def _load_pretrained_(model: nn.Module, job: Job, world: Team) -> list[str]:
    """Load the pretrained weights of a library; one rank of each node downloads them."""
    settings, dataset = job.recipe.model, job.dataset
    found = first_then_rest(
        world, lambda: pretrained(settings, model, len(dataset.classes), dataset.channels)
    )
    without = (*settings.weights_except, *found.head)
    notes = world.agree(lambda: load_foreign_(model, found.state, found.source, without))
    return [f"{found.source}: pretrained weights", *notes]


def _load_file_(model: nn.Module, settings: Model) -> list[str]:
    """Load the file that a recipe names into a model, and return what a person should know."""
    path = settings.weights
    assert path is not None
    file = read_state_dict(path, settings.weights_entry)
    if "count" in file.header:
        raise UserError(f"{path} holds a sum over the cycles of a group: name one of its models")
    return [*file.notes, *load_foreign_(model, file.tensors, str(path), settings.weights_except)]
