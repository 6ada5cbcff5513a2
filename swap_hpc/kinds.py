"""What each tensor of a model is to SWAP: what is averaged, what is estimated anew, and what stays one group's.

Parameters and running means are averaged; other buffers and extra states are the first group's, of
which batch norm's statistics and the vectors of power iterations are then estimated anew. The
README's section on guarantees has the table.

Layers that keep their statistics while the model trains (frozen batch norm) keep them everywhere.
"""

import copy
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swap_hpc.tensors import has_numbers

EXTRA_STATE = "_extra_state"  # what torch calls it in a state dict


def batchnorm_layers(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Name and module of the batch-norm layers that keep running statistics."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of what is averaged: the parameters, and running means of layers other than batch norm.

    The tensors are the model's own, also where its state dict hands out copies. Tied weights appear once.
    """
    return dict(model.named_parameters()) | {name: b for name, b in state_buffers(model).items() if is_running(model, name)}


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of the buffers that are not averaged: the first group's stay, or batch norm is estimated anew."""
    return {name: b for name, b in state_buffers(model).items() if not is_running(model, name)}


def state_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of the buffers that belong to a model's state: the persistent ones."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        passing = getattr(module, "_non_persistent_buffers_set", ())
        for name, buffer in module.named_buffers(recurse=False):
            if name not in passing and id(buffer) not in seen:
                seen.add(id(buffer))
                found[_join(prefix, name)] = buffer
    return found


def is_running(model: nn.Module, name: str) -> bool:
    """Tell whether a buffer is a running mean of a layer other than batch norm, by its name, as torch's layers have it."""
    prefix, _, last = name.rpartition(".")
    layer = model.get_submodule(prefix)
    return last.startswith("running_") and not isinstance(layer, _BatchNorm) and has_numbers(layer.get_buffer(last))


def team_means(model: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer of which a team's ranks, each having seen its share of the batches, take the mean.

    Running statistics of the layers that are in training mode now.
    """
    means = {}
    for prefix, module in model.named_modules():
        for last, buffer in module.named_buffers(recurse=False):
            if module.training and has_numbers(buffer) and last.startswith("running_"):
                means[_join(prefix, last)] = buffer
    return means


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


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


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, extra states as the bytes of `torch.save`, (n,) uint8. Its tensors are the model's own."""
    return {name: encoded(value) if is_extra(name) else value for name, value in model.state_dict().items()}


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
    return torch.load(io.BytesIO(tensor.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)


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
