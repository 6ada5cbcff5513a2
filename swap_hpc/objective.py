"""What is trained for and what is measured: a loss and a score, classification's or a user's own."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn import functional as F

from swap_hpc.imports import imported
from swap_hpc.recipe import Recipe

Measure: TypeAlias = Callable[[Any, Tensor], Tensor]  # of a model's outputs and the targets; floating-point outputs are float32


@dataclass(frozen=True)
class Objective:
    loss: Measure  # scalar: the mean over samples, of training
    total_loss: Measure  # scalar: the sum over samples, of evaluation
    score: Measure  # (n,): of each sample, the more the better; files call its mean the accuracy


def is_right(outputs: Tensor, targets: Tensor) -> Tensor:
    """(n,) bool: whether the largest of (n, classes) logits is the label's."""
    return outputs.argmax(1) == targets


CLASSIFICATION = Objective(F.cross_entropy, partial(F.cross_entropy, reduction="sum"), is_right)


def objective(recipe: Recipe) -> Objective:
    """The one that a recipe names. Raises UserError for a loss or a metric that cannot be imported."""
    score = CLASSIFICATION.score if recipe.metric == "accuracy" else imported(recipe.metric, "the metric")
    if recipe.loss == "cross_entropy":
        return Objective(partial(F.cross_entropy, label_smoothing=recipe.label_smoothing), CLASSIFICATION.total_loss, score)
    own = imported(recipe.loss, "the loss")
    return Objective(own, lambda outputs, targets: own(outputs, targets) * len(targets), score)


def as_float32(outputs: Any) -> Any:
    """A model's outputs, out of autocast; tensors of tuples, lists and dictionaries, too."""
    if isinstance(outputs, Tensor):
        return outputs.float() if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        return {name: as_float32(each) for name, each in outputs.items()}
    return type(outputs)(as_float32(each) for each in outputs) if isinstance(outputs, tuple | list) else outputs
