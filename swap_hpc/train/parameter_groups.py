"""Which parameters an optimizer trains, and with which settings."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from swap_hpc.errors import UserError
from swap_hpc.recipe.optimizer import Optimizer
from swap_hpc.train.layers import layers_of

# In torch's parameter groups: the factor of the group's learning rate; 1 where it is missing.
SCALE = "learning_rate_scale"

# How LARS and LAMB leave out what makes them differ from SGD and Adam.
PLAIN: dict[str, dict[str, Any]] = {"lars": {"trust": 0.0}, "lamb": {"layer_adaptation": False}}


def freeze_(model: nn.Module, recipe: Optimizer) -> None:
    """Let the parameters of a recipe's frozen groups have no gradient.

    Raises:
        UserError: as `parameter_groups`.
    """
    group_of = _group_of(model, recipe)
    for name, parameter in model.named_parameters():
        number = group_of[name]
        if number is not None and recipe.groups[number].frozen:
            parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, recipe: Optimizer) -> list[dict[str, Any]]:
    """Return torch's parameter groups, with the settings in which they differ.

    They come in the order of the recipe's groups, the parameters without a group first, then by
    layer, and vectors that are not decayed last.

    Args:
        model: the model; parameters of frozen groups are left out.
        recipe: the optimizer's section.

    Returns:
        Dictionaries with `params`, `arguments` (the group's own), and perhaps other settings.

    Raises:
        UserError: a pattern matches no parameter, or none is left to train.
    """
    group_of = _group_of(model, recipe)
    layers = layers_of(model) if recipe.layer_decay else {}
    members: dict[tuple[int, int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        number = group_of[name]
        if number is not None and recipe.groups[number].frozen:
            continue
        is_spared = not recipe.decay_vectors and parameter.ndim <= 1
        key = (-1 if number is None else number, layers.get(name, 0), is_spared)
        members.setdefault(key, []).append(parameter)
    if not members:
        raise UserError("optimizer.groups freezes all parameters: nothing is left to train")
    depth = max(layers.values(), default=0)
    if recipe.layer_decay and not depth:
        raise UserError("optimizer.layer_decay: the model has one layer, which has all the rate")
    if not recipe.decay_vectors and not any(is_spared for _, _, is_spared in members):
        raise UserError("optimizer.decay_vectors = false: the model has no vector to spare")
    return [
        {"params": members[key], **_settings(recipe, *key, depth=depth)} for key in sorted(members)
    ]


def _settings(
    recipe: Optimizer, number: int, layer: int, is_spared: bool, depth: int
) -> dict[str, Any]:
    """Return what a parameter group sets itself.

    Args:
        recipe: the optimizer's section.
        number: the recipe's group, or -1 for none.
        layer: the number of the layer.
        is_spared: the parameters are vectors that are not decayed, unless their group says so.
        depth: the number of the last layer.
    """
    settings: dict[str, Any] = {"arguments": {}}
    if is_spared:
        settings |= {"weight_decay": 0.0, **PLAIN.get(recipe.name, {})}
    scale = (recipe.layer_decay or 1.0) ** (depth - layer)
    if number >= 0:
        group = recipe.groups[number]
        settings["arguments"] = group.arguments
        scale *= group.learning_rate_scale
        if group.weight_decay is not None:
            settings["weight_decay"] = group.weight_decay
    return settings if scale == 1 else {**settings, SCALE: scale}


def _group_of(model: nn.Module, recipe: Optimizer) -> dict[str, int | None]:
    """Return the number of each parameter's group in the recipe, by the parameter's name."""
    names = [name for name, _ in model.named_parameters()]
    unused = {(n, pattern) for n, group in enumerate(recipe.groups) for pattern in group.match}
    group_of: dict[str, int | None] = {}
    for name in names:
        matching = list(_matching(name, recipe))
        unused -= set(matching)
        group_of[name] = matching[0][0] if matching else None
    for _, pattern in sorted(unused):
        raise UserError(
            f'optimizer.groups: match = "{pattern}" matches none of the {len(names)} parameters: '
            f"{_some(names)}"
        )
    for number, group in enumerate(recipe.groups):
        if number not in group_of.values():
            raise UserError(
                f'optimizer.groups: all that match = "{group.match[0]}" matches belongs to an '
                "earlier group: put the narrower pattern first"
            )
    return group_of


def _matching(name: str, recipe: Optimizer) -> Iterator[tuple[int, str]]:
    """Yield the groups, in order, and their patterns that match a parameter's name."""
    for number, group in enumerate(recipe.groups):
        for pattern in group.match:
            if fnmatchcase(name, pattern):
                yield number, pattern


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else ", ".join([*names[:3], "...", *names[-3:]])
