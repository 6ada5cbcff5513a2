"""All that can fail before training, on all ranks alike: the device, the data, the model."""

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import nn

from swap_hpc.average.kinds import batchnorm_layers
from swap_hpc.data import Arrays, Dataset, load
from swap_hpc.errors import UserError
from swap_hpc.parallel.devices import BF16, Device, dotted, use_device
from swap_hpc.parallel.horovod import check_horovod
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.schema import Recipe
from swap_hpc.run.weights import load_weights_
from swap_hpc.train.job import Job


def prepare(recipe: Recipe, world: Team, node: Team) -> tuple[Job, nn.Module]:
    """The job that a recipe describes, and its model as training begins, on this rank's device. Raises UserError, on all ranks."""
    device = use_device(world, node, recipe.device)
    world.agree(lambda: check_device(recipe, device))
    if world.size > 1:
        shared = device.is_shared(world)
        world.agree(lambda: check_horovod(device, shared))
    choose_algorithms(recipe)
    dataset = load(recipe.data, world, device.threads)
    job = Job(recipe, dataset, device)
    model = world.agree(lambda: _model(job))
    world.agree(lambda: _check_sizes(recipe, dataset, bool(batchnorm_layers(model))))
    world.agree(lambda: job.objective)  # may be a user's own
    return job, model


def check_device(recipe: Recipe, device: Device) -> None:
    """Raises UserError where this rank's device, or its host, cannot do what the recipe asks for."""
    if recipe.precision == "bf16" and device.capability and device.capability < BF16:
        raise UserError(
            f'precision = "bf16" needs a GPU of compute capability {dotted(BF16)} (A100) or newer, and {device.name} has '
            f"{dotted(device.capability)}: --set precision=fp32 (fp16, which it does have, is not supported yet)"
        )
    if recipe.compile:
        check_compiler(device)


def check_compiler(device: Device) -> None:
    """Raises UserError where torch.compile would find no compiler: on a GPU, too, it compiles C that launches its kernels."""
    variable, *programs = ("CC", "gcc", "clang") if device.torch.type == "cuda" else ("CXX", "g++")
    named = os.environ.get(variable, "").split()[:1]
    lacking = [] if any(map(shutil.which, [*named, *programs])) else [f"a compiler ({programs[0]})"]
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    lacking += [] if headers.is_file() else [f"Python's headers ({headers})"]
    if lacking:
        raise UserError(
            f"compile = true: torch.compile needs {' and '.join(lacking)} where the ranks run: "
            "install them (Debian: apt-get install g++ python3-dev; an image: RUN_PACKAGES), or --set compile=false"
        )


def choose_algorithms(recipe: Recipe) -> None:
    """Tells torch and cuDNN, for this process, what a recipe says of their algorithms; leaves alone what it does not."""
    if recipe.cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
    if recipe.deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # else cuBLAS may sum in another order each time
        os.environ.setdefault(
            "NCCL_ALGO", "^NVLS"
        )  # switches of NVLink may sum in another order each time
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing here reads memory that nobody wrote


def _model(job: Job) -> nn.Module:
    model = job.build()
    if job.recipe.model.weights:
        load_weights_(model, job.recipe.model.weights)
    return model


def _check_sizes(recipe: Recipe, dataset: Dataset, batchnorm: bool) -> None:
    samples = len(dataset.train)
    used = {
        "large_batch.batch_size": recipe.large_batch.batch_size if recipe.large_batch.epochs else 0
    }
    if recipe.refine.epochs:
        used["refine.batch_size"] = recipe.refine.batch_size
    if recipe.refine.epochs and batchnorm:
        used["batchnorm.batch_size"] = recipe.batchnorm.batch_size
        used["batchnorm.samples"] = recipe.batchnorm.samples or 0
    for name, wanted in used.items():
        if wanted > samples:
            raise UserError(
                f"{name} = {wanted}, but there are {samples} training samples: --set {name}={samples} or less"
            )
    every, steps = recipe.refine.average_every_steps, samples // recipe.refine.batch_size
    if every and every > steps and recipe.refine.epochs:
        raise UserError(
            f"refine.average_every_steps = {every} is more than the {steps} steps of an epoch: set it to {steps} or less"
        )
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
