"""State dicts: their entries, extra states, and the split into weights and buffers."""

import copy
import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from swap_hpc.average.kinds import qualified

EXTRA_STATE = "_extra_state"  # torch's name for it in a state dict


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict, with extra states as the bytes of `torch.save`, (n,) uint8.

    Its other tensors are the model's own.
    """
    return {
        name: encoded(value) if is_extra(name) else value
        for name, value in model.state_dict().items()
    }


def entries_of(model: nn.Module, tensors: Iterable[Tensor]) -> set[str]:
    """Return the names under which tensors of a model stand in its state dict.

    They are found by their place in memory: a model may name its entries as it likes.
    """
    places = {_place(tensor) for tensor in tensors}
    entries = ((name, value) for name, value in model.state_dict().items() if not is_extra(name))
    return {name for name, tensor in entries if _place(tensor) in places}


def _place(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def is_extra(name: str) -> bool:
    """Tell whether an entry of a state dict is what a module's `get_extra_state` returned."""
    return name.rpartition(".")[2] == EXTRA_STATE


def encoded(value: Any) -> Tensor:
    """Return any value as the bytes of `torch.save`, (n,) uint8.

    They do not depend on the device of the tensors in it.
    """
    file = io.BytesIO()
    torch.save(_on_cpu(value), file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _on_cpu(value: Any) -> Any:
    """Return the same value, with the tensors of dictionaries, lists and tuples on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        moved = {key: _on_cpu(each) for key, each in value.items()}
        return moved if type(value) is dict else _like(value, moved)
    if type(value) in (list, tuple):
        return type(value)(_on_cpu(each) for each in value)
    return value


def _like(value: dict[Any, Any], moved: dict[Any, Any]) -> dict[Any, Any]:
    """Return a dictionary of another class, such as OrderedDict, with the values in `moved`.

    It is returned as it is if nothing moved.
    """
    if all(moved[key] is each for key, each in value.items()):
        return value
    other = copy.copy(value)
    other.update(moved)
    return other


def decoded(tensor: Tensor) -> Any:
    """Return the value that `encoded` was given, its tensors on the CPU; runs no code.

    Raises:
        pickle.UnpicklingError: the value holds something else than tensors and plain values.
    """
    file = io.BytesIO(tensor.cpu().numpy().tobytes())
    return torch.load(file, map_location="cpu", weights_only=True)


def extra_states(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> bytes, (n,) uint8, of the modules' extra states, named as in a state dict."""
    return {
        qualified(prefix, EXTRA_STATE): encoded(module.get_extra_state())
        for prefix, module in model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def set_extra_states_(model: nn.Module, states: dict[str, Tensor]) -> None:
    """Set the modules' extra states from what `extra_states` returned."""
    for name, state in states.items():
        model.get_submodule(name.rpartition(".")[0]).set_extra_state(decoded(state))


def split_state(
    state: dict[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights and the buffers in a state dict of `model`, as a `SavePoint` has them.

    Extra states count as buffers.
    """
    own = entries_of(model, model.buffers())
    buffers = {name: t for name, t in state.items() if name in own or is_extra(name)}
    weights = {name: t for name, t in state.items() if name not in buffers}
    return weights, buffers
