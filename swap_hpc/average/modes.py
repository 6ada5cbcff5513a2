"""Training and evaluation mode of the modules of a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@torch.no_grad()
def training_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that are in training mode while `model` trains.

    Not among them: those that are in evaluation mode now although `model` is in training mode, and those that
    `model.train()` leaves in evaluation mode, as models with frozen batch norm do. Every mode is left as it was.
    """
    modes = {module: module.training for module in model.modules()}
    frozen = {module for module, training in modes.items() if model.training and not training}
    with restored_modes(model):
        model.train()
        return {module for module in modes if module.training} - frozen


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the mode again, training or evaluation, in which it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode; afterwards every module has the mode again that it had, which need not be the model's."""
    with restored_modes(model):
        model.eval()
        yield
