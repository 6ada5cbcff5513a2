"""The training and evaluation modes of a model's modules."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


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
