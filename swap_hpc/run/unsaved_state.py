"""State of a model or an optimizer that is not saved: attributes, generators, some buffers."""

import random
from collections.abc import Sized
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swap_hpc.parallel.tensors import tensor_bytes

# "module.attribute" -> the value, and a mark by which a change of it is seen; see `_mark`.
Snapshot = dict[str, tuple[Any, Any]]

# Attributes that every module has; torch sets the last one only when a hook is registered.
_INTERNAL = {*vars(nn.Module()), "_forward_hooks_with_kwargs"}


def unsaved_state(model: nn.Module) -> Snapshot:
    """Return the plain attributes of all modules, and the buffers not in the state dict.

    A module with a `get_extra_state` of its own is left out: it saves what it needs.
    """
    saved = {t.data_ptr() for t in model.state_dict().values() if isinstance(t, Tensor)}
    found: Snapshot = {}
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            continue
        values = {name: value for name, value in vars(module).items() if name not in _INTERNAL}
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.data_ptr() not in saved:
                values[name] = buffer
        prefix = f"{path}." if path else ""
        found |= {prefix + name: (value, _mark(value)) for name, value in values.items()}
    return found


def attributes_of(optimizer: torch.optim.Optimizer) -> Snapshot:
    """Return the attributes of an optimizer besides those that are saved."""
    saved = ("state", "param_groups", "defaults")
    values = {name: value for name, value in vars(optimizer).items() if name not in saved}
    return {name: (value, _mark(value)) for name, value in values.items()}


def changed_names(before: Snapshot, after: Snapshot) -> list[str]:
    """Return the names of the values that are in both snapshots and have changed.

    Tensors that were computed from parameters do not count: they are results, not state.
    """
    changed = []
    for name, (value, mark) in after.items():
        _, old_mark = before.get(name, (None, None))
        is_result = isinstance(value, Tensor) and value.grad_fn is not None
        if old_mark not in (None, mark) and not is_result:
            changed.append(name)
    return changed


def unsaved_warning(name: str, changed: list[str]) -> str:
    """Return a line that warns of state which is lost, given its names and the model's."""
    return (
        f"warning: a step changes {_listed(changed)} of the model {name}, which its "
        "state dict does not hold: phase 2 and a resumed run begin with what the builder makes; "
        "keep it in a buffer, or let get_extra_state return it"
    )


def unsaved_attributes_warning(name: str, changed: list[str]) -> str:
    """Return a line that warns of an optimizer's attributes which are lost."""
    return (
        f"warning: a step changes {_listed(changed)} of the optimizer {name}, which is not saved: "
        "a resumed run begins with what the class makes; keep it in state or param_groups, or let "
        "state_dict return it and load_state_dict take it back"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _mark(value: Any) -> Any:
    """Return something small that differs after a change; None where nothing cheap does."""
    with suppress(Exception):  # sparse arrays, quantized tensors and others refuse
        return _mark_of_type(value)
    return None


def _mark_of_type(value: Any) -> Any:
    match value:
        case torch.Generator():
            return value.get_state().numpy().tobytes()
        case np.random.Generator():
            return repr(value.bit_generator.state)
        case np.random.RandomState():
            return repr(value.get_state())
        case random.Random():
            return hash(value.getstate())
        case Tensor():
            is_lazy = nn.parameter.is_lazy(value)
            return None if is_lazy else hash(tensor_bytes(value).tobytes())
        case np.ndarray():
            return hash(value.tobytes())
        case bool() | int() | float() | complex() | str():
            return value
        case nn.Module():
            return None
        case Sized():
            return len(value)
    return None
