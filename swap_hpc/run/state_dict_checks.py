"""Checks that a model's state dict is what is trained, and that a file can hold it."""

import re
from itertools import chain
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from swap_hpc.average.state import EXTRA_STATE, decoded, encoded, is_extra
from swap_hpc.errors import UserError


def check_state_dict(model: nn.Module, name: str) -> None:
    """Check that a state dict holds the model's own tensors, and can be saved and loaded.

    Args:
        model: its state dict is checked.
        name: of the model, for messages.

    Raises:
        UserError: it does not, or cannot.
    """
    state = model.state_dict()
    for entry, value in state.items():
        if is_extra(entry):
            _check_extra_state(entry, value, name)
        elif not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UserError(
                f"the state dict of the model {name} holds {entry}, a {kind}: "
                "only tensors, and get_extra_state, can be saved"
            )
    tensors = {entry: value for entry, value in state.items() if not is_extra(entry)}
    _check_types(tensors, name)
    _check_memory(tensors, model, name)


def _check_extra_state(entry: str, value: Any, name: str) -> None:
    """Check that what a module's `get_extra_state` returned can be loaded without running code."""
    try:
        decoded(encoded(value))
    except Exception as error:  # pickle passes on what the value's own methods raise
        module = entry.removesuffix(EXTRA_STATE).removesuffix(".") or "the module"
        found = re.search(r"GLOBAL (\S+)", str(error))
        kind = f"a {found[1]}" if found else "a value"
        raise UserError(
            f"get_extra_state of {module} of the model {name} returns {kind}, which cannot be "
            "loaded without running code: return tensors, numbers, strings, lists and dictionaries"
        ) from None


def _check_types(tensors: dict[str, Tensor], name: str) -> None:
    """Check that a .safetensors file can hold the types of all tensors."""
    first_of_type = {tensor.dtype: entry for entry, tensor in reversed(tensors.items())}
    for dtype, entry in first_of_type.items():
        try:
            save({entry: torch.empty(0, dtype=dtype)})
        except (KeyError, ValueError, SafetensorError):
            kind = str(dtype).removeprefix("torch.")
            raise UserError(
                f"{entry} of the model {name} is {kind}, which a .safetensors file cannot hold: "
                "use another type"
            ) from None


def _check_memory(tensors: dict[str, Tensor], model: nn.Module, name: str) -> None:
    """Check that the state dict's tensors are the parameters and buffers that are trained.

    It may leave out what is not trained, and hold a parameter under another name.
    """
    memory = {_memory(tensor) for tensor in tensors.values()}
    for entry, tensor in chain(model.named_parameters(), model.named_buffers()):
        if not tensor.numel():
            continue
        if entry in tensors:
            how = "" if _memory(tensors[entry]) == _memory(tensor) else "returns a copy of"
        else:
            is_lost = tensor.requires_grad and _memory(tensor) not in memory
            how = "leaves out" if is_lost else ""
        if how:
            raise UserError(
                f"the state dict of the model {name} {how} {entry}: what is saved would not be "
                "what is trained; let it hold the model's own tensors"
            )


def _memory(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size]:
    """Return a key that two tensors share if they are the same memory read in the same way."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape
