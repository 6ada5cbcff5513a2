"""The fields of a recipe that describe the optimizer."""

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    model_validator,
)

from swap_hpc.recipe.section import Section
from swap_hpc.recipe.values import Fraction, check_finite, one_as_several

# The defaults of the optimizers that have a name of their own. A field that is missing here has no
# effect on the optimizer and is refused. All other optimizers are classes, with their own defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": False},
    "lars": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "trust": 0.001},
    "lamb": {"weight_decay": 0.01},
    "adamw": {"weight_decay": 0.01, "fused": False},
}
SETTINGS = ("momentum", "nesterov", "weight_decay", "trust", "fused")

# Recipes that earlier versions wrote out hold these fields with every optimizer.
_WRITTEN_BEFORE: dict[str, dict[str, Any]] = {
    "sgd": {"trust": 0.001},
    "lars": {"fused": False},
}

_BETAS = "; its momentum is the first of optimizer.arguments.betas"


def _checked_name(name: str) -> str:
    if name not in DEFAULTS and not re.fullmatch(r"[A-Za-z]\w*|[\w.]+:\w+", name):
        raise ValueError(
            f"needs {', '.join(DEFAULTS)}, a class of torch.optim such as RAdam, or "
            '"package.module:Class"'
        )
    return name


def _check_arguments(arguments: dict[str, Any], fields: dict[str, str]) -> None:
    """Check a table of arguments.

    Args:
        arguments: The table.
        fields: Arguments that a recipe sets by other fields, with the names of these.

    Raises:
        ValueError: An argument has another field, or is not finite.
    """
    for name in arguments:
        if name in fields:
            raise ValueError(f"arguments.{name}: set it by {fields[name]}")
    check_finite(arguments)


class ParameterGroup(Section):
    """Parameters with settings of their own. A parameter belongs to the first group that matches.
    One that no group matches has the optimizer's settings."""

    match: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(one_as_several)]
    """Patterns of parameters' names, as in a shell: `"*.bias"`, `"blocks.[0-3].*"`; `*` matches
    dots, too. Each has to match a parameter."""
    learning_rate_scale: PositiveFloat = 1.0
    """Factor of the learning rate."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay. None: the optimizer's, and none for vectors without `decay_vectors`."""
    frozen: bool = False
    """The parameters are not trained. The running statistics of their batch norm still are."""
    arguments: dict[str, Any] = Field(default={})
    """Further settings, which override those of `optimizer.arguments`."""

    @model_validator(mode="after")
    def _fields_have_an_effect(self) -> "ParameterGroup":
        fields = {"lr": "learning_rate_scale", "weight_decay": "weight_decay"}
        _check_arguments(self.arguments, {k: f"the group's {v}" for k, v in fields.items()})
        settings: dict[str, Any] = {
            "learning_rate_scale": 1.0,
            "weight_decay": None,
            "arguments": {},
        }
        given = [name for name, default in settings.items() if getattr(self, name) != default]
        if self.frozen and given:
            raise ValueError(f"{given[0]} has no effect with frozen = true: leave it out")
        return self


class Optimizer(Section):
    """The optimizer of both phases. Its state begins anew in each phase."""

    name: Annotated[str, AfterValidator(_checked_name)] = "sgd"
    """`sgd`; `lars` (arXiv 1708.03888) and `lamb` (arXiv 1904.00962) for very large batches;
    `adamw`; any other class of `torch.optim` by its name, such as `RAdam`; or a class of your own,
    `package.module:Class`."""
    momentum: Fraction | None = None
    """Momentum; its buffer starts at zero in each phase. None: 0.9 for `sgd` and `lars`."""
    nesterov: bool | None = None
    """Use Nesterov momentum. None: true for `sgd` and `lars`."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay. `sgd`, `lars`: this fraction of the weights is added to their gradient; `lamb`,
    `adamw`: of the weights is subtracted at each step, times the learning rate. None: 5e-4 for
    `sgd` and `lars`, 0.01 for `lamb` and `adamw`, the class's own for others."""
    decay_vectors: bool = True
    """Also decay batch-norm parameters and biases. False: they are not decayed; LARS then updates
    them as SGD does, and LAMB as Adam does."""
    trust: PositiveFloat | None = None
    """LARS: norm of a step relative to the norm of the weights, at a learning rate of 1. None:
    0.001."""
    clip_norm: PositiveFloat | None = None
    """Largest 2-norm of the gradient of all parameters together, after its mean over the ranks and
    over `accumulate`; a larger gradient is scaled down to it before the step. None: no
    clipping."""
    fused: bool | None = None
    """Update several tensors in one kernel, which takes fewer launches on a GPU. It rounds
    differently. None: false."""
    layer_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Layer-wise decay of the learning rate: the last layer has all of it, and each layer this
    share of the next one's. Layers are numbered as timm does where the model has a
    `group_matcher`. Otherwise they are the members of each Sequential or ModuleList, and the
    children beside it, in their order. None: all have the same."""
    arguments: dict[str, Any] = Field(default={})
    """Further arguments of the optimizer's class, such as `betas` or `eps`."""
    groups: tuple[ParameterGroup, ...] = ()
    """Parameters with settings of their own, by patterns of names."""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, given: Any) -> Any:
        """Set the defaults of the optimizer's name, so that a recipe tells what is used."""
        name = given.get("name", "sgd") if isinstance(given, dict) else None
        if not isinstance(name, str) or name not in DEFAULTS:
            return given
        obsolete = _WRITTEN_BEFORE.get(name, {}).items()
        return DEFAULTS[name] | {key: v for key, v in given.items() if (key, v) not in obsolete}

    @model_validator(mode="after")
    def _fields_fit_the_optimizer(self) -> "Optimizer":
        own = DEFAULTS.get(self.name)
        for field in SETTINGS if own is not None else ("trust",):
            if getattr(self, field) is not None and field not in (own or {}):
                raise ValueError(self._not_taken(field))
        if own and self.nesterov and not self.momentum:
            raise ValueError("nesterov = true needs a momentum above 0")
        fields = {"lr": "the phase's learning_rate", "params": "optimizer.groups"}
        fields |= {field: f"optimizer.{field}" for field in SETTINGS}
        _check_arguments(self.arguments, fields)
        return self

    def _not_taken(self, field: str) -> str:
        owners = [name for name, defaults in DEFAULTS.items() if field in defaults]
        hint = _BETAS if field == "momentum" and self.name in ("lamb", "adamw") else ""
        return f"{field} belongs to {' and '.join(owners)}: {self.name} has none{hint}"
