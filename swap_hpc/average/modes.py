"""The training and evaluation modes of a model's modules, and whether it is the plain module."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def check_unwrapped(model: nn.Module) -> None:
    """Check that a model's forward pass waits for no other rank.

    Raises:
        ValueError: it is, or holds, a DistributedDataParallel, or its weights are sharded (FSDP).
            With another number of batches on one rank, the ranks would wait for each other forever.
    """
    if _is_sharded(model):
        raise ValueError(
            "the model's weights are sharded over ranks (FSDP, or DTensor), so that no rank has a "
            "copy to average: load torch.distributed.checkpoint.state_dict.get_model_state_dict("
            "model, options=StateDictOptions(full_state_dict=True)) into the module as it was"
        )
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "the model is a DistributedDataParallel, whose forward pass waits for other ranks, and "
            "which keeps the ranks' weights equal: refine and average the module in it, "
            "model.module"
        )


def _is_sharded(model: nn.Module) -> bool:
    """Tell whether each rank has a part of the weights: FullyShardedDataParallel or DTensor."""
    # torch imports neither by itself: without an import there is none
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(each, fsdp.FullyShardedDataParallel) for each in model.modules()):
        return True
    sharded = sys.modules.get("torch.distributed.tensor")
    tensors = chain(model.parameters(), model.buffers())
    return sharded is not None and any(isinstance(each, sharded.DTensor) for each in tensors)


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
