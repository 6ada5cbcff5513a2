"""The state of any optimizer, as a tree that a checkpoint can keep.

A tree is a tensor, a number, a truth value, text, None, or a list, tuple or dictionary of trees.
In a checkpoint its tensors are tensors of the file, and the rest is JSON. A tensor that stands at
several places of a tree is kept once, and is one tensor again when it is restored.
"""

import inspect
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from swap_hpc.errors import UserError

PLAIN = (bool, int, float, str, type(None))


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the whole state of an optimizer as a tree; its tensors are the live ones.

    Args:
        optimizer: any of `torch.optim`, or a subclass of `torch.optim.Optimizer` that keeps its
            state, as torch asks for, in `state` and `param_groups`.
        model: the model whose parameters it trains.

    Returns:
        `state`: by the name of the parameter, what its optimizer keeps for it; `groups`: the
        settings of each parameter group; `elsewhere`: the paths in `state` of tensors that do not
        lie on their parameter's device (Adam's step counters lie on the host); `more`: what else
        a class with a `state_dict` of its own returns, if it returns more.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    # Without torch's guard against torch.compile, which never sees an optimizer here: it imports
    # torch._dynamo, seconds of each rank's start.
    packed = inspect.unwrap(type(optimizer).state_dict)(optimizer)
    # torch numbers the parameters in the order in which the groups list them
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    state: dict[Any, Any] = {}
    elsewhere: list[str] = []
    for key, kept in packed["state"].items():
        if not isinstance(key, int):
            state[key] = kept  # kept for the optimizer as a whole
            continue
        parameter = parameters[key]
        name = names[parameter]
        state[name] = kept
        tensors = flatten(kept, name)[1]
        elsewhere += [path for path, t in tensors.items() if t.device != parameter.device]
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in packed["param_groups"]
    ]
    found = {"state": state, "groups": groups, "elsewhere": elsewhere}
    more = {key: value for key, value in packed.items() if key not in ("state", "param_groups")}
    return found | ({"more": more} if more else {})


def restore_optimizer_(
    optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Any]
) -> None:
    """Give an optimizer the state that `optimizer_state` returned for one built alike.

    Unlike `Optimizer.load_state_dict` it rounds nothing: torch casts floating state to the type of
    its parameter. A class's own `load_state_dict` is called first, for what else it keeps.
    """
    if has_own_loading(optimizer):
        optimizer.load_state_dict(_state_dict(optimizer, model, saved))
        optimizer.state.clear()
    parameters = dict(model.named_parameters())
    elsewhere = set(saved["elsewhere"])
    copies: dict[int, Tensor] = {}  # of the saved tensors, by their identity

    def placed(tree: Any, path: str, parameter: nn.Parameter | None) -> Any:
        match tree:
            case Tensor():
                if id(tree) not in copies:
                    stays = parameter is None or path in elsewhere
                    copies[id(tree)] = tree.clone() if stays else _beside(tree, parameter)
                return copies[id(tree)]
            case dict():
                return {
                    key: placed(each, f"{path}/{_component(key)}", parameter)
                    for key, each in tree.items()
                }
            case list() | tuple():
                parts = [placed(each, f"{path}/{i}", parameter) for i, each in enumerate(tree)]
                return type(tree)(parts)
        return tree

    for name, kept in saved["state"].items():
        parameter = parameters.get(name)
        key = name if parameter is None else parameter
        optimizer.state[key] = placed(kept, name, parameter)
    for group, settings in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(placed(settings, "", None))


def has_own_loading(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether an optimizer's class has a `load_state_dict` of its own."""
    return type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict


def _state_dict(
    optimizer: torch.optim.Optimizer, model: nn.Module, saved: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a saved state as the optimizer's own `state_dict` has it; its tensors are copies."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    listed = [names[each] for group in optimizer.param_groups for each in group["params"]]
    numbers: dict[Any, int] = {name: number for number, name in enumerate(listed)}
    first, groups = 0, []
    for group, settings in zip(optimizer.param_groups, saved["groups"], strict=True):
        following = first + len(group["params"])
        groups.append({**settings, "params": list(range(first, following))})
        first = following
    state = {numbers.get(key, key): kept for key, kept in saved["state"].items()}
    return deepcopy({"state": state, "param_groups": groups, **saved.get("more", {})})


def _beside(tensor: Tensor, parameter: nn.Parameter | None) -> Tensor:
    """Return a copy on the device of a parameter, in its memory format where the shapes agree."""
    assert parameter is not None
    if tensor.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
    return tensor.to(parameter.device, copy=True)


def flatten(tree: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Divide a tree into JSON and tensors; `unflatten` is the reverse.

    Args:
        tree: the tree.
        path: where it stands in a larger one: the beginning of all paths.

    Returns:
        The tree as JSON can hold it, with its path in the place of each tensor; and path -> tensor.

    Raises:
        UserError: the tree holds something that a checkpoint cannot keep.
    """
    tensors: dict[str, Tensor] = {}
    paths: dict[int, str] = {}  # of the tensors, by their identity

    def described(tree: Any, path: str) -> Any:
        match tree:
            case Tensor():
                first = paths.setdefault(id(tree), path)
                tensors[first] = tree
                return {"tensor": first}
            case dict():
                for key in tree:
                    _check_plain(key, path)
                return {
                    "dict": [
                        [key, described(each, f"{path}/{_component(key)}")]
                        for key, each in tree.items()
                    ]
                }
            case list() | tuple():
                kind = "list" if isinstance(tree, list) else "tuple"
                return {kind: [described(each, f"{path}/{i}") for i, each in enumerate(tree)]}
        _check_plain(tree, path)
        return tree

    return described(tree, path), tensors


def _component(key: Any) -> str:
    """Return a dictionary's key as a part of a path; no two keys of a dictionary share one."""
    if isinstance(key, str):  # escaped as in a JSON pointer (RFC 6901)
        return key.replace("~", "~0").replace("/", "~1").replace("#", "~2")
    return f"#{key}"


def _check_plain(value: Any, path: str) -> None:
    if type(value) not in PLAIN:
        raise UserError(
            f"the optimizer keeps a {type(value).__name__} at {path.lstrip('/')}, which a "
            "checkpoint cannot hold: use tensors, numbers, text, lists, tuples and dictionaries"
        )


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the tree that `flatten` divided.

    Args:
        value: the tree as JSON.
        tensors: its tensors by their paths; they may be among others.
    """
    match value:
        case {"tensor": path}:
            return tensors[path]
        case {"dict": pairs}:
            return {key: unflatten(each, tensors) for key, each in pairs}
        case {"list": parts}:
            return [unflatten(each, tensors) for each in parts]
        case {"tuple": parts}:
            return tuple(unflatten(each, tensors) for each in parts)
    return value
