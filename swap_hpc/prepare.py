"""All that can fail before training, on all ranks alike: the device, the data, the model."""

import torch
from torch import nn

from swap_hpc.data import Arrays, Dataset, load
from swap_hpc.devices import choose_device
from swap_hpc.errors import UserError
from swap_hpc.files import load_weights_
from swap_hpc.gradients import check_horovod
from swap_hpc.job import Job
from swap_hpc.kinds import batchnorm_layers
from swap_hpc.ranks import Team
from swap_hpc.recipe import Recipe


def prepare(recipe: Recipe, world: Team, node: Team) -> tuple[Job, nn.Module]:
    """The job that a recipe describes, and its model as training begins, on this rank's device. Raises UserError, on all ranks."""
    device = world.agree(lambda: choose_device(node, recipe.device))
    kinds = world.allgather(device.torch.type)
    if len(set(kinds)) > 1:
        raise UserError(f"rank {kinds.index('cpu')} sees no GPU, others do: ask the launcher for a GPU per rank, or --set device=cpu")
    if world.size > 1:
        world.agree(lambda: check_horovod(device))
    torch.set_num_threads(device.threads)
    if device.torch.type == "cuda":
        torch.cuda.set_device(device.torch)
    dataset = load(recipe.data, world, device.threads)
    job = Job(recipe, dataset, device)
    model = world.agree(lambda: _model(job))
    world.agree(lambda: _check_sizes(recipe, dataset, bool(batchnorm_layers(model))))
    world.agree(lambda: job.objective)  # may be a user's own
    return job, model


def _model(job: Job) -> nn.Module:
    model = job.build()
    if job.recipe.model.weights:
        load_weights_(model, job.recipe.model.weights)
    return model


def _check_sizes(recipe: Recipe, dataset: Dataset, batchnorm: bool) -> None:
    samples = len(dataset.train)
    used = {"large_batch.batch_size": recipe.large_batch.batch_size if recipe.large_batch.epochs else 0}
    if recipe.refine.epochs:
        used["refine.batch_size"] = recipe.refine.batch_size
    if recipe.refine.epochs and batchnorm:
        used["batchnorm.batch_size"] = recipe.batchnorm.batch_size
        used["batchnorm.samples"] = recipe.batchnorm.samples or 0
    for name, wanted in used.items():
        if wanted > samples:
            raise UserError(f"{name} = {wanted}, but there are {samples} training samples: --set {name}={samples} or less")
    every, steps = recipe.refine.average_every_steps, samples // recipe.refine.batch_size
    if every and every > steps and recipe.refine.epochs:
        raise UserError(f"refine.average_every_steps = {every} is more than the {steps} steps of an epoch: set it to {steps} or less")
    if recipe.batchnorm.samples and recipe.batchnorm.samples < recipe.batchnorm.batch_size:
        raise UserError(
            f"batchnorm.samples = {recipe.batchnorm.samples} is less than one batch: "
            f"--set batchnorm.samples={recipe.batchnorm.batch_size} or more"
        )
    smallest, pad = min(dataset.image_size), recipe.augment.pad
    if not isinstance(dataset.train, Arrays):
        return
    if pad >= smallest or recipe.augment.cutout > smallest:
        raise UserError(
            f"augment.pad = {pad} and augment.cutout = {recipe.augment.cutout} do not fit images of {smallest} pixels: make them smaller"
        )
