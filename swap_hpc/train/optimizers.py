"""The optimizer of a recipe: one of ours, any of `torch.optim`, or a user's class."""

import inspect
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from swap_hpc.errors import UserError
from swap_hpc.recipe.imports import imported
from swap_hpc.recipe.optimizer import SETTINGS, Optimizer
from swap_hpc.train.lamb import Lamb
from swap_hpc.train.lars import Lars
from swap_hpc.train.parameter_groups import PLAIN, parameter_groups

Class = type[torch.optim.Optimizer]

OWN: dict[str, Class] = {
    "sgd": torch.optim.SGD,
    "lars": Lars,
    "lamb": Lamb,
    "adamw": torch.optim.AdamW,
}

_unguarded: dict[Any, type[Any]] = {}  # what `without_guards` has made

# What a training step cannot give: a function that computes the loss again, sparse gradients.
_REFUSED = {
    "LBFGS": "it computes the loss several times per step",
    "SparseAdam": "it takes sparse gradients only, which ranks do not average",
}


def build_optimizer(model: nn.Module, recipe: Optimizer) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over the parameters of `model`, with a learning rate of 0.

    Parameters of frozen groups are left out; `freeze_` freezes them.

    Raises:
        UserError: in one line, there is no such optimizer, or it cannot train this model.
    """
    built = optimizer_class(recipe)
    settings = _settings(recipe, built)
    groups = parameter_groups(model, recipe)
    for group, mine in zip(groups, (group.pop("arguments") for group in groups), strict=True):
        group.update(_as_the_class_wants(mine, built))
    try:
        # at a rate of 1, because some classes refuse 0
        optimizer = without_guards(built)(groups, lr=1.0, **settings)
        for rule in recipe.groups:  # torch checks the arguments of the class, not of a group
            own = _as_the_class_wants(rule.arguments, built)
            without_guards(built)([nn.Parameter(torch.zeros(1, 1))], lr=1.0, **settings | own)
    except Exception as error:  # a class of one's own may raise anything
        raise UserError(f"the optimizer {recipe.name}: {' '.join(str(error).split())}") from None
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


@torch.no_grad()
def check_follows_rate(
    optimizer: torch.optim.Optimizer, model: nn.Module, before: nn.Module, recipe: Optimizer
) -> None:
    """Check that a class uses the learning rates that its groups have when it steps.

    Args:
        optimizer: has made one step, at a rate of 0.
        model: after the step, with its gradients; it is changed if the step has changed it.
        before: the model as it was before the step.
        recipe: names the optimizer.

    Raises:
        UserError: the step moved the weights about as far as one at a rate of 1 does.
    """
    moved = _distance(model, before)
    if moved == 0:
        return
    for parameter, old in zip(model.parameters(), before.parameters(), strict=True):
        parameter.copy_(old)
    another = build_optimizer(model, recipe)
    for group in another.param_groups:
        group["lr"] = 1.0
    another.step()
    if moved > 0.01 * _distance(model, before):
        raise UserError(
            f"the optimizer {recipe.name} moves the weights at a learning rate of 0: it does not "
            'read group["lr"] of its param_groups in each step, where the schedule sets the rate'
        )


def _distance(model: nn.Module, other: nn.Module) -> float:
    """Return the largest change of a weight."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)


def optimizer_class(recipe: Optimizer) -> Class:
    """Return the class of a recipe's optimizer, which takes all that the recipe sets.

    Raises:
        UserError: in one line, there is no such optimizer, it cannot work here, or it does not
            take one of the recipe's fields or arguments.
    """
    found = OWN.get(recipe.name) or _class_by_name(recipe.name)
    _check_takes(found, recipe)
    return found


def torch_optimizers() -> list[str]:
    """Return the names of the classes of `torch.optim` that can train a model here."""
    classes = {
        name: each
        for name, each in vars(torch.optim).items()
        if isinstance(each, type) and issubclass(each, torch.optim.Optimizer)
    }
    return sorted(classes.keys() - _REFUSED.keys() - {"Optimizer"})


def _class_by_name(name: str) -> Class:
    if name in _REFUSED:
        raise UserError(f"the optimizer {name} cannot be used: {_REFUSED[name]}")
    if ":" not in name:
        return _class_of_torch(name)
    found = imported(name, "the optimizer")
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"the optimizer {name} is not a class derived from torch.optim.Optimizer")
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(f"the optimizer {name} cannot be used: {_REFUSED['LBFGS']} (closure)")
    if hasattr(found, "train") and hasattr(found, "eval"):
        raise UserError(
            f"the optimizer {name} cannot be used: it trains other weights than are evaluated, "
            "and nothing here calls its train() and eval()"
        )
    return found


def _class_of_torch(name: str) -> Class:
    known = torch_optimizers()
    if name not in known:
        by_lower_case = {each.lower(): each for each in (*OWN, *known)}
        near = get_close_matches(name.lower(), by_lower_case, 1)
        hint = f"; is it {by_lower_case[near[0]]}?" if near else "."
        raise UserError(
            f"no optimizer {name}{hint} Known are {', '.join(OWN)}, of torch.optim "
            f'{", ".join(known)}, and "package.module:Class"'
        )
    found: Class = getattr(torch.optim, name)
    return found


def _check_takes(built: Class, recipe: Optimizer) -> None:
    """Check that a class takes the fields and the arguments that a recipe sets."""
    takes, others = _parameters_of(built)
    for field in SETTINGS:
        if getattr(recipe, field) is not None and field not in takes and not others:
            raise UserError(f"optimizer.{field}: {recipe.name} does not take it")
    decays = not recipe.decay_vectors or any(g.weight_decay is not None for g in recipe.groups)
    if decays and "weight_decay" not in takes and not others:
        raise UserError(f"the optimizer {recipe.name} has no weight decay: nothing to set or spare")
    decay = takes.get("weight_decay") if recipe.weight_decay is None else recipe.weight_decay
    if not recipe.decay_vectors and decay == 0 and recipe.name not in PLAIN:
        raise UserError("optimizer.decay_vectors = false: nothing is decayed, weight_decay is 0")
    arguments = set(recipe.arguments).union(*(group.arguments for group in recipe.groups))
    unknown = sorted(arguments - takes.keys()) if not others else []
    if unknown:
        free = takes.keys() - {"lr", "weight_decay", "differentiable", *SETTINGS}
        raise UserError(
            f"optimizer.arguments.{unknown[0]}: {recipe.name} takes {', '.join(sorted(free))}"
        )


def _parameters_of(built: Class) -> tuple[dict[str, Any], bool]:
    """Return a class's keyword arguments with their defaults, and whether it takes any others."""
    parameters = list(inspect.signature(built).parameters.values())
    others = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    return {each.name: each.default for each in parameters[1:]}, others


def _settings(recipe: Optimizer, built: Class) -> dict[str, Any]:
    """Return the arguments of a class for a recipe; those that it leaves open are left out."""
    fields = {field: getattr(recipe, field) for field in SETTINGS}
    # False would also take from torch its loop over several tensors at once (foreach).
    fields["fused"] = fields["fused"] or None
    given = {field: value for field, value in fields.items() if value is not None}
    return given | _as_the_class_wants(recipe.arguments, built)


def _as_the_class_wants(arguments: dict[str, Any], built: Class) -> dict[str, Any]:
    """Return arguments with TOML's arrays as tuples, unless the class has a list by default."""
    defaults, _ = _parameters_of(built)
    return {
        name: tuple(value)
        if isinstance(value, list) and not isinstance(defaults.get(name), list)
        else value
        for name, value in arguments.items()
    }


def without_guards(built: Class) -> type[Any]:
    """Return a class without torch's guards against torch.compile.

    The guards import torch._dynamo, which adds seconds to the start of each rank. They are not
    needed: only the forward and backward pass is ever compiled.
    """
    if built in _unguarded:
        return _unguarded[built]
    plain = {
        name: inspect.unwrap(getattr(built, name))
        for name in ("add_param_group", "zero_grad")
        if getattr(built, name) is getattr(torch.optim.Optimizer, name)
    }
    if built.step.__module__.startswith("torch.optim"):
        plain["step"] = torch.no_grad()(inspect.unwrap(built.step))
    made = type(built.__name__, (built,), {**plain, "__module__": built.__module__})
    return _unguarded.setdefault(built, made)
