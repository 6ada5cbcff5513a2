"""State dicts in files of any program: `.safetensors`, or those of `torch.save`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swap_hpc.average.state import encoded, is_extra
from swap_hpc.errors import UserError
from swap_hpc.recipe.wording import first_few
from swap_hpc.run.checkpoint import model_state
from swap_hpc.run.torch_files import OF_MODULE, PICKLE, ZIP, StandIn, read_torch_file
from swap_hpc.run.weights import (
    Tensors,
    Unreadable,
    check_readable,
    is_checkpoint,
    is_safetensors,
    read_tensors,
)

# Entries in which programs keep a model's state dict, the usual ones first. An average that a
# program keeps beside the model comes last: it is taken where a recipe asks for it.
ENTRIES = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "weights",
    "params",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
)
DEPTH = 3  # of the nested dictionaries that are searched


class StateDict(NamedTuple):
    """A state dict as a file holds it.

    Attributes:
        tensors: name -> dense tensor on the CPU; extra states as `state_of` has them.
        header: of a .safetensors file of this program; empty for others.
        notes: lines for a person, such as the entry of the file that it was taken from.
    """

    tensors: Tensors
    header: dict[str, str]
    notes: tuple[str, ...] = ()


def read_state_dict(path: Path, entry: str | None = None) -> StateDict:
    """Read the state dict in a file of this or another program; nothing in it is executed.

    What the file is decides its content, not its name. In a checkpoint of this program the state
    dict is that of the model; a file of a group's sum over cycles is read as it is.

    Args:
        path: the file.
        entry: the entry that holds the state dict in a file of `torch.save`, as in
            "state_dict_ema" or "state.model". None: the file itself, or the first of `ENTRIES`
            that is there, or the only entry that can be meant.

    Raises:
        UserError: the file cannot be used.
        RunError: the system cannot read it now.
    """
    try:
        return _read(path, entry)
    except Unreadable as why:
        raise UserError(f"cannot read the weights {path}: {why}") from None


def _read(path: Path, entry: str | None) -> StateDict:
    check_readable(path)
    with path.open("rb") as file:
        start = file.read(16)
    # The length of a .safetensors file's header may begin with the byte of a pickle.
    if is_safetensors(start) or not start.startswith((ZIP, PICKLE)):
        tensors, header = read_tensors(path)
        if entry is not None:
            raise Unreadable(f"a .safetensors file has no entries: leave out the entry {entry}")
        return StateDict(model_state(tensors, header) if is_checkpoint(header) else tensors, header)
    content, unknown = read_torch_file(path)
    notes = []
    if unknown:
        notes.append(f"{path}: left out, since nothing in a file is run: {first_few(unknown, 5)}")
    state, where = _chosen(content, entry)
    if where:
        notes.append(f"{path}: the weights in its entry {where}")
    _check_tensors(state)
    return StateDict(state, {}, tuple(notes))


def _chosen(content: Any, entry: str | None) -> tuple[Tensors, str]:
    """Return the state dict in the content of a file, and where it is: "" for the content itself.

    Raises:
        Unreadable: there is none, or which one is meant is open.
    """
    found = dict(_state_dicts(content))
    if entry is not None:
        if entry not in found:
            there = f"it has {first_few([*found], 5)}" if any(found) else "it has no entries"
            raise Unreadable(f"no state dict in its entry {entry}: {there}")
        return found[entry], entry
    known = [path for name in ENTRIES for path in found if path.rpartition(".")[2] == name]
    chosen = known[0] if known else next(iter(found), None)
    if chosen is None:
        raise Unreadable(_why_none(content))
    if not known and len(found) > 1:
        raise Unreadable(
            f"several state dicts, {first_few([*found], 5)}: "
            f"choose one, --set model.weights_entry={chosen}"
        )
    if others := [path for path in known if path != chosen]:
        hint = f"it also has {first_few(others)}: --set model.weights_entry={others[0]}"
        return found[chosen], f"{chosen} ({hint})"
    return found[chosen], chosen


def _state_dicts(content: Any, at: str = "", depth: int = DEPTH) -> Iterator[tuple[str, Tensors]]:
    """Yield path and tensors of each state dict in nested dictionaries, the outer ones first."""
    if not isinstance(content, Mapping):
        return
    if state := _as_state_dict(content):
        yield at, state
        return
    inner = [
        (f"{at}.{key}" if at else key, value)
        for key, value in content.items()
        # an optimizer keeps tensors by name, too
        if isinstance(key, str) and isinstance(value, Mapping) and not key.startswith("optim")
    ]
    flat = [(path, state) for path, value in inner if (state := _as_state_dict(value))]
    yield from flat
    if depth > 1:
        there = {path for path, _ in flat}
        for path, value in inner:
            if path not in there:
                yield from _state_dicts(value, path, depth - 1)


def _as_state_dict(content: Mapping[Any, Any]) -> Tensors | None:
    """Return a dictionary of tensors by name, and extra states, as `state_of` does; else None."""
    if not any(isinstance(value, Tensor) for value in content.values()):
        return None
    state = {}
    for name, value in content.items():
        if not isinstance(name, str) or not (isinstance(value, Tensor) or is_extra(name)):
            return None
        state[name] = encoded(value) if is_extra(name) else value.detach()
    return state


def _why_none(content: Any) -> str:
    """Return why there is no state dict in the content of a file."""
    if isinstance(content, StandIn):
        return f"it holds an object of the class {content.name}, not a state dict: {OF_MODULE}"
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}, not a state dict"
    if not content:
        return "it holds an empty dictionary, not a state dict"
    for name in ENTRIES:
        if isinstance(inner := content.get(name), StandIn):
            kind = inner.name
            return f"its entry {name} is an object of the class {kind}: {OF_MODULE}"
    others = [f"{name} ({_kind(v)})" for name, v in content.items() if not isinstance(v, Tensor)]
    if not others:
        names = first_few([repr(name) for name in content if not isinstance(name, str)])
        return f"its dictionary names tensors by something else than texts: {names}"
    return f"it holds no dictionary of tensors alone: it has {first_few(others)}"


def _kind(value: Any) -> str:
    return value.name if isinstance(value, StandIn) else type(value).__name__


def _check_tensors(state: Tensors) -> None:
    """Raise Unreadable for a tensor whose values cannot be copied into a plain, dense one."""
    for name, tensor in state.items():
        if tensor.layout is not torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise Unreadable(f"its {name} is of layout {layout}: dense tensors are needed")
        if tensor.is_meta:
            raise Unreadable(f"its {name} is on the meta device, which holds no values")
        if tensor.is_quantized:
            raise Unreadable(f"its {name} is quantized: plain tensors are needed")
