"""The loss that is trained and the score that is reported: classification's, or a user's own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from swap_hpc.errors import UserError
from swap_hpc.recipe.imports import imported
from swap_hpc.recipe.schema import Recipe

# (outputs, targets) -> values. The outputs are the model's, in float32 if they are floating-point.
Measure: TypeAlias = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """The functions of (outputs, targets) that a run trains and reports."""

    loss: Measure  # scalar, the mean over the samples: for training
    total_loss: Measure  # scalar, the sum over the samples: for evaluation
    score: Measure  # (n,), one value per sample, larger is better: files call its mean the accuracy


def is_right(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (n,) bool: True where the largest of (n, classes) logits is that of the target."""
    return outputs.argmax(1) == targets


CLASSIFICATION = Objective(F.cross_entropy, partial(F.cross_entropy, reduction="sum"), is_right)


def objective(recipe: Recipe, classes: int) -> Objective:
    """Return the objective that a recipe names.

    Raises:
        UserError: A loss or a metric cannot be imported. Later, when it is called: it returns
            something else than `Objective` describes, or the model's outputs are not logits of
            `classes`.
    """
    score = CLASSIFICATION.score if recipe.metric == "accuracy" else _own_score(recipe.metric)
    if recipe.loss == "cross_entropy":
        return Objective(_cross_entropy(recipe, classes), CLASSIFICATION.total_loss, score)
    loss = _own_loss(recipe.loss)

    def total_loss(outputs: Any, targets: Tensor) -> Tensor:
        return loss(outputs, targets) * len(targets)

    return Objective(loss, total_loss, score)


def _cross_entropy(recipe: Recipe, classes: int) -> Measure:
    def loss(outputs: Any, targets: Tensor) -> Tensor:
        # Targets of more dimensions, such as probabilities or masks, are left to torch's checks.
        if targets.ndim == 1:
            expected = (len(targets), classes)
            if not isinstance(outputs, Tensor) or outputs.shape != expected:
                raise UserError(
                    f"the model {recipe.model.name} returned {_described(outputs)}: "
                    f"logits {list(expected)} are needed"
                )
        return F.cross_entropy(outputs, targets, label_smoothing=recipe.label_smoothing)

    return loss


def _own_loss(path: str) -> Measure:
    function = imported(path, "the loss")

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        value = function(outputs, targets)
        if not isinstance(value, Tensor) or value.shape or not value.is_floating_point():
            raise UserError(
                f"the loss {path} returned {_described(value)}: "
                "the batch's mean, a floating-point tensor without dimensions, is needed"
            )
        return value

    return loss


def _own_score(path: str) -> Measure:
    function = imported(path, "the metric")

    @torch.no_grad()
    def score(outputs: Any, targets: Tensor) -> Tensor:
        values = function(outputs, targets)
        if not isinstance(values, Tensor) or values.shape != targets.shape[:1]:
            raise UserError(
                f"the metric {path} returned {_described(values)}: "
                f"one score per sample, a tensor [{len(targets)}], is needed"
            )
        return values

    return score


def _described(value: Any) -> str:
    """Return the type of a value for a message; for a tensor, its shape and dtype."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor {list(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def as_float32(outputs: Any) -> Any:
    """Return a model's outputs with all floating-point tensors as float32, outside of autocast.

    Tensors in tuples, lists and dictionaries are converted, too.
    """
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        named = {name: as_float32(each) for name, each in outputs.items()}
        # A subclass, such as transformers' ModelOutput, may offer its keys as attributes, too.
        return named if type(outputs) is dict else type(outputs)(**named)
    if isinstance(outputs, tuple | list):
        parts = [as_float32(each) for each in outputs]
        is_named_tuple = hasattr(outputs, "_fields")
        return type(outputs)(*parts) if is_named_tuple else type(outputs)(parts)
    return outputs
