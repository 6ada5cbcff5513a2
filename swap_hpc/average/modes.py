"""The training and evaluation modes of a model's modules, and whether it is the plain module."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def check_unwrapped(model: nn.Module) -> None:
    """Check that a model's forward pass waits for no other rank.

    Raises:
        ValueError: it is, or holds, a DistributedDataParallel. With another number of batches on
            one rank, the ranks would wait for each other forever.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is a DistributedDataParallel, whose forward pass waits for other ranks, and "
            "which keeps the ranks' weights equal: refine and average the module in it, "
            "model.module"
        )


@torch.no_grad()
def training_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules that are in training mode while `model` trains.

    Frozen modules are not among them: those that `model.train()` leaves in evaluation mode, and
    those that are in evaluation mode now although `model` is in training mode. Modes are not
    changed.
    """
    modes = {module: module.training for module in model.modules()}
    frozen = {module for module, training in modes.items() if model.training and not training}
    with restored_modes(model):
        model.train()
        return {module for module in modes if module.training} - frozen


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Put every module back into its present mode when the context ends."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode; at the context's end each module has its own mode back."""
    with restored_modes(model):
        model.eval()
        yield
