"""All that can fail before training, on all ranks alike: the device, the data, the model."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import nn

from swap_hpc.average.kinds import batchnorm_layers
from swap_hpc.data import Dataset, load
from swap_hpc.data.fields import check_fields
from swap_hpc.data.labels import check_labels
from swap_hpc.data.loader import padding_on_host
from swap_hpc.errors import UserError
from swap_hpc.parallel.devices import BF16, FP16, Device, dotted, use_device
from swap_hpc.parallel.horovod import check_horovod
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.schema import Recipe
from swap_hpc.train.job import Job
from swap_hpc.train.optimizers import optimizer_class


def prepare(recipe: Recipe, world: Team, node: Team) -> tuple[Job, nn.Module]:
    """Return the job that a recipe describes and its model as the builder makes it; collective.

    Args:
        recipe: what to train, and how.
        world: all ranks of the job.
        node: the ranks on this rank's node.

    Returns:
        The job, and the model on this rank's device.

    Raises:
        UserError: on all ranks, the recipe cannot be trained here.
    """
    device = use_device(world, node, recipe.device)
    world.agree(lambda: check_device(recipe, device))
    if world.size > 1:
        shared = device.is_shared(world)
        world.agree(lambda: check_horovod(device, shared))
    choose_algorithms(recipe)
    world.agree(lambda: optimizer_class(recipe.optimizer))
    pad = padding_on_host(recipe.augment, device)
    dataset = load(recipe.data, world, device.threads, pad)
    world.agree(lambda: check_fields(recipe.data, recipe.augment, dataset))
    world.agree(lambda: check_labels(recipe.data.name, dataset, recipe.loss))
    job = Job(recipe, dataset, device)
    model = world.agree(job.build)
    world.agree(lambda: _check_sizes(recipe, dataset, model))
    world.agree(lambda: job.objective)  # a user's own loss may not be importable
    return job, model


def check_device(recipe: Recipe, device: Device) -> None:
    """Check that this rank's device, and its host, can do what the recipe asks for.

    Raises:
        UserError: they cannot.
    """
    capability = device.capability
    if recipe.precision == "bf16" and capability and capability < BF16:
        raise UserError(
            f'precision = "bf16" needs a GPU of compute capability {dotted(BF16)} (A100) or newer, '
            f"and {device.name} has {dotted(capability)}: --set precision=fp16 or fp32"
        )
    if recipe.precision == "fp16" and capability and capability < FP16:
        raise UserError(
            f'precision = "fp16" needs a GPU of compute capability {dotted(FP16)} or newer, '
            f"and {device.name} has {dotted(capability)}: --set precision=fp32"
        )
    if recipe.compile:
        check_compiler(device)


def check_compiler(device: Device) -> None:
    """Check that torch.compile finds a compiler and Python's headers.

    On a GPU, too, it needs a C compiler, for the code that launches its kernels.

    Raises:
        UserError: one of them is missing.
    """
    variable, *programs = ("CC", "gcc", "clang") if device.torch.type == "cuda" else ("CXX", "g++")
    chosen_by_user = os.environ.get(variable, "").split()[:1]  # the options after it do not matter
    missing = []
    if not any(map(shutil.which, [*chosen_by_user, *programs])):
        missing.append(f"a compiler ({programs[0]})")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not headers.is_file():
        missing.append(f"Python's headers ({headers})")
    if missing:
        raise UserError(
            f"compile = true: torch.compile needs {' and '.join(missing)} where the ranks run: "
            "install them (Debian: apt-get install g++ python3-dev; an image: RUN_PACKAGES), "
            "or --set compile=false"
        )


def choose_algorithms(recipe: Recipe) -> None:
    """Set torch, cuDNN, cuBLAS and NCCL to the algorithms that a recipe asks for, in this process.

    What the recipe does not ask for stays as it is.
    """
    if recipe.cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
    if not recipe.deterministic:
        return
    # Without these, cuBLAS and the switches of NVLink may sum in another order each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "^NVLS")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that nobody wrote, so filling it first would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _check_sizes(recipe: Recipe, dataset: Dataset, model: nn.Module) -> None:
    """Check that the recipe's sizes fit the data set.

    Raises:
        UserError: one of them does not.
    """
    has_batchnorm = bool(batchnorm_layers(model))
    _check_samples(recipe, len(dataset.train), has_batchnorm)
    _check_steps(recipe, len(dataset.train))


def _check_samples(recipe: Recipe, samples: int, has_batchnorm: bool) -> None:
    """Check that no batch needs more than the training samples."""
    used = {}
    if recipe.large_batch.epochs:
        used["large_batch.batch_size"] = recipe.large_batch.batch_size
    if recipe.refine.epochs:
        used["refine.batch_size"] = recipe.refine.batch_size
    if recipe.refine.epochs and has_batchnorm:
        used["batchnorm.batch_size"] = recipe.batchnorm.batch_size
        used["batchnorm.samples"] = recipe.batchnorm.samples or 0
    if recipe.augment.mixes and used.get("batchnorm.batch_size", 0) % 2:
        raise UserError(
            f"batchnorm.batch_size = {recipe.batchnorm.batch_size} is odd, and augment.mixup and "
            "augment.cutmix mix pairs of images: set an even one"
        )
    for name, wanted in used.items():
        if wanted > samples:
            raise UserError(
                f"{name} = {wanted}, but there are {samples} training samples: "
                f"--set {name}={samples} or less"
            )


def _check_steps(recipe: Recipe, samples: int) -> None:
    """Check that groups are averaged within an epoch, and batch norm over at least one batch."""
    every = recipe.refine.average_every_steps
    steps = samples // recipe.refine.batch_size
    if recipe.refine.epochs and every and every > steps:
        raise UserError(
            f"refine.average_every_steps = {every} is more than the {steps} steps of an epoch: "
            f"set it to {steps} or less"
        )
    chosen, batch_size = recipe.batchnorm.samples, recipe.batchnorm.batch_size
    if chosen and chosen < batch_size:
        raise UserError(
            f"batchnorm.samples = {chosen} is less than one batch: "
            f"--set batchnorm.samples={batch_size} or more"
        )
