"""The layers of a model, numbered from its input to its output."""

from typing import Any

from torch import nn

_LISTS = (nn.Sequential, nn.ModuleList)


def layers_of(model: nn.Module) -> dict[str, int]:
    """Return the number of each parameter's layer, from 0, by the parameter's name.

    A model with a `group_matcher` is numbered by timm, whose models have one. In any other, each
    member of a Sequential or ModuleList is a layer. What holds such a list, at any depth, is cut
    into its children; any other child is a layer. Their order is that in which the model registers
    them. A parameter beside them belongs to the layer before it.

    Args:
        model: any model. A layer without parameters does not count.
    """
    if hasattr(model, "group_matcher"):
        return _layers_of_timm(model)
    layers: dict[str, int] = {}
    _number(model, "", layers, 0)
    # a tied parameter has its first name only
    return {name: layers[name] for name, _ in model.named_parameters()}


def _number(module: nn.Module, prefix: str, layers: dict[str, int], count: int) -> int:
    """Add the layers of a module that is cut into its children.

    Args:
        module: the module.
        prefix: of the names of its parameters.
        layers: number by name, of the layers so far.
        count: number of layers so far.

    Returns:
        The number of layers with those of the module.
    """
    for name, _ in module.named_parameters(recurse=False):
        layers[prefix + name] = max(0, count - 1)
    for name, child in module.named_children():
        inside = f"{prefix}{name}."
        if not isinstance(module, _LISTS) and _holds_a_list(child):
            count = _number(child, inside, layers, count)
            continue
        names = [inside + parameter for parameter, _ in child.named_parameters()]
        layers |= dict.fromkeys(names, count)
        count += bool(names)
    return count


def _holds_a_list(module: nn.Module) -> bool:
    return any(isinstance(each, _LISTS) for each in module.modules())


def _layers_of_timm(model: nn.Module) -> dict[str, int]:
    from timm.models import group_parameters

    matcher: Any = model.group_matcher
    numbers = group_parameters(model, matcher(coarse=False), reverse=True)
    return {name: int(number) for name, number in numbers.items()}
