"""What is trained for and what is measured: a loss and a score, classification's or a user's own."""

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

Measure: TypeAlias = Callable[
    [Any, Tensor], Tensor
]  # of a model's outputs and the targets; floating-point outputs are float32


@dataclass(frozen=True)
class Objective:
    loss: Measure  # scalar: the mean over samples, of training
    total_loss: Measure  # scalar: the sum over samples, of evaluation
    score: Measure  # (n,): of each sample, the more the better; files call its mean the accuracy


def is_right(outputs: Tensor, targets: Tensor) -> Tensor:
    """(n,) bool: whether the largest of (n, classes) logits is the label's."""
    return outputs.argmax(1) == targets


CLASSIFICATION = Objective(F.cross_entropy, partial(F.cross_entropy, reduction="sum"), is_right)


def objective(recipe: Recipe, classes: int) -> Objective:
    """The one that a recipe names. Raises UserError for a loss or a metric that cannot be imported, and, when called, for one that
    returns anything else than `Objective` says, and for outputs of a model that are no logits of `classes`."""
    score = CLASSIFICATION.score if recipe.metric == "accuracy" else _own_score(recipe.metric)
    if recipe.loss == "cross_entropy":

        def loss(outputs: Any, targets: Tensor) -> Tensor:
            if targets.ndim == 1 and (
                not isinstance(outputs, Tensor) or outputs.shape != (len(targets), classes)
            ):
                raise UserError(
                    f"the model {recipe.model.name} returned {_told(outputs)}: logits [{len(targets)}, {classes}] are needed"
                )
            return F.cross_entropy(outputs, targets, label_smoothing=recipe.label_smoothing)

        return Objective(loss, CLASSIFICATION.total_loss, score)
    own = _own_loss(recipe.loss)
    return Objective(own, lambda outputs, targets: own(outputs, targets) * len(targets), score)


def _own_loss(path: str) -> Measure:
    function = imported(path, "the loss")

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        found = function(outputs, targets)
        if not isinstance(found, Tensor) or found.shape or not found.is_floating_point():
            raise UserError(
                f"the loss {path} returned {_told(found)}: the batch's mean, a tensor without dimensions, is needed"
            )
        return found

    return loss


def _own_score(path: str) -> Measure:
    function = imported(path, "the metric")

    @torch.no_grad()
    def score(outputs: Any, targets: Tensor) -> Tensor:
        found = function(outputs, targets)
        if not isinstance(found, Tensor) or found.shape != targets.shape[:1]:
            raise UserError(
                f"the metric {path} returned {_told(found)}: a score of each sample, a tensor [{len(targets)}], is needed"
            )
        return found

    return score


def _told(found: Any) -> str:
    if not isinstance(found, Tensor):
        return f"a {type(found).__name__}"
    return f"a tensor {list(found.shape)} {str(found.dtype).removeprefix('torch.')}"


def as_float32(outputs: Any) -> Any:
    """A model's outputs, out of autocast; tensors of tuples, lists and dictionaries, too."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        named = {name: as_float32(each) for name, each in outputs.items()}
        return (
            named if type(outputs) is dict else type(outputs)(**named)
        )  # a class of its own may have attributes
    if isinstance(outputs, tuple | list):
        parts = [as_float32(each) for each in outputs]
        return type(outputs)(*parts) if hasattr(outputs, "_fields") else type(outputs)(parts)
    return outputs
