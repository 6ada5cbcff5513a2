"""State dicts: their entries, extra states, and the split into weights and buffers."""

import copy
import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from swap_hpc.average.kinds import _join

EXTRA_STATE = "_extra_state"  # what torch calls it in a state dict


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, extra states as the bytes of `torch.save`, (n,) uint8. Its tensors are the model's own."""
    return {
        name: encoded(value) if is_extra(name) else value
        for name, value in model.state_dict().items()
    }


def entries_of(model: nn.Module, tensors: Iterable[Tensor]) -> set[str]:
    """The names under which tensors of a model stand in its state dict, which may give them names of its own."""
    places = {(t.data_ptr(), t.shape, t.stride()) for t in tensors}
    entries = ((name, value) for name, value in model.state_dict().items() if not is_extra(name))
    return {name for name, t in entries if (t.data_ptr(), t.shape, t.stride()) in places}


def is_extra(name: str) -> bool:
    """Tell whether an entry of a state dict is what a module's `get_extra_state` returned."""
    return name.rpartition(".")[2] == EXTRA_STATE


def encoded(value: Any) -> Tensor:
    """Any value as the bytes of `torch.save`, (n,) uint8; they do not tell on which device its tensors are."""
    file = io.BytesIO()
    torch.save(_on_cpu(value), file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _on_cpu(value: Any) -> Any:
    """The same value, the tensors of dictionaries, lists and tuples on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        moved = {key: _on_cpu(each) for key, each in value.items()}
        return moved if type(value) is dict else _like(value, moved)
    if type(value) in (list, tuple):
        return type(value)(_on_cpu(each) for each in value)
    return value


def _like(value: dict[Any, Any], moved: dict[Any, Any]) -> dict[Any, Any]:
    """A dictionary of another class, such as OrderedDict, with other values; as it is where nothing moved."""
    if all(moved[key] is each for key, each in value.items()):
        return value
    other = copy.copy(value)
    other.update(moved)
    return other


def decoded(tensor: Tensor) -> Any:
    """The reverse of `encoded`; runs no code: raises pickle.UnpicklingError for anything but tensors and plain values."""
    return torch.load(
        io.BytesIO(tensor.cpu().numpy().tobytes()), map_location="cpu", weights_only=True
    )


def extra_states(model: nn.Module) -> dict[str, Tensor]:
    """Name -> bytes of the modules' extra states, as in a state dict."""
    return {
        _join(prefix, EXTRA_STATE): encoded(module.get_extra_state())
        for prefix, module in model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def set_extra_states_(model: nn.Module, states: dict[str, Tensor]) -> None:
    """The reverse of `extra_states`."""
    for name, state in states.items():
        model.get_submodule(name.rpartition(".")[0]).set_extra_state(decoded(state))


def split_state(
    state: dict[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights and the buffers in a state dict of `model`, as a `SavePoint` takes them."""
    own = entries_of(model, model.buffers())
    buffers = {name: t for name, t in state.items() if name in own or is_extra(name)}
    return {name: t for name, t in state.items() if name not in buffers}, buffers
