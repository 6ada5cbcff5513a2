"""The loss that is trained and the metrics that are reported: classification's, or a user's own."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from swap_hpc.data.nested import first_tensor, mapped
from swap_hpc.errors import RunError, UserError
from swap_hpc.recipe.imports import imported, in_one_line
from swap_hpc.recipe.schema import Recipe
from swap_hpc.train.events import Evaluation
from swap_hpc.train.metrics import ACCURACY, TOP5, Measure, Metric, class_accuracy, mean_of

IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclass(frozen=True)
class Objective:
    """The functions of (outputs, targets) that a run trains and reports."""

    loss: Measure  # scalar, the mean over the samples: for training
    total_loss: Measure  # scalar, the sum over the samples: for evaluation
    metrics: tuple[Metric, ...] = (ACCURACY,)  # the first one is the main one

    @property
    def size(self) -> int:
        """The number of sums that all metrics need together."""
        return sum(metric.size for metric in self.metrics)

    def sums(self, outputs: Any, targets: Any) -> Tensor:
        """Return what a batch adds to the sums of all metrics, (size,) float64."""
        found = [metric.sums(outputs, targets) for metric in self.metrics]
        return found[0].double() if len(found) == 1 else torch.cat(found).double()

    def evaluation(self, loss: float, sums: Sequence[float], samples: float) -> Evaluation:
        """Return the means over samples.

        Args:
            loss: the sum of the losses.
            sums: (size,), those of all metrics; empty where there is no sample.
            samples: their number.

        Raises:
            RunError: a user's metric fails.
        """
        ends = accumulate(metric.size for metric in self.metrics)
        values: dict[str, float] = {}
        by_class: dict[str, list[float | None]] = {}
        for metric, end in zip(self.metrics, ends, strict=True):
            own = sums[end - metric.size : end]
            with in_one_line(f"the metric {metric.name} fails on its sums", RunError):
                values[metric.name] = _defined(metric.value, own, samples)
                if metric.by_class:
                    by_class[metric.name] = metric.by_class(own, samples)
        return Evaluation(loss / samples, values, by_class)


def _total_cross_entropy(outputs: Any, targets: Any) -> Tensor:
    """Return the number of samples times the mean that training takes.

    It is the sum over the samples, except where torch's mean is another one: over the pixels of
    masks, and over those labels that are not -100.
    """
    if targets.ndim == 1:
        counted = (targets != IGNORED).sum().clamp(min=1)
        return F.cross_entropy(outputs, targets, reduction="sum") * (len(targets) / counted)
    if targets.ndim == 2 and targets.is_floating_point():
        return F.cross_entropy(outputs, targets, reduction="sum")
    return F.cross_entropy(outputs, targets) * len(targets)


def _defined(value: Callable[..., float], sums: Sequence[float], samples: float) -> float:
    """Return a metric's figure, NaN where it is not defined: a division by zero, a log of 0."""
    try:
        return float(value(sums, samples))
    except (ArithmeticError, ValueError):
        return math.nan


CLASSIFICATION = Objective(F.cross_entropy, _total_cross_entropy)


def objective(recipe: Recipe, classes: int) -> Objective:
    """Return the objective that a recipe names.

    Raises:
        UserError: A loss or a metric cannot be imported. Later, when it is called: it returns
            something else than `Objective` describes, or the model's outputs are not logits of
            `classes`.
    """
    metrics = tuple(_metric(metric.name, classes) for metric in recipe.metrics)
    if recipe.loss == "cross_entropy":
        return Objective(_cross_entropy(recipe, classes), CLASSIFICATION.total_loss, metrics)
    loss = _own_loss(recipe.loss)

    def total_loss(outputs: Any, targets: Any) -> Tensor:
        return loss(outputs, targets) * len(first_tensor(targets))

    return Objective(loss, total_loss, metrics)


def _cross_entropy(recipe: Recipe, classes: int) -> Measure:
    def loss(outputs: Any, targets: Any) -> Tensor:
        if not isinstance(targets, Tensor):
            raise UserError(
                f"the targets are {_described(targets)}, and cross_entropy takes one tensor: "
                'name a loss of your own (loss = "package.module:function")'
            )
        # Targets of other kinds, such as masks, are left to torch's checks.
        are_shares = targets.ndim == 2 and targets.is_floating_point()
        if targets.ndim == 1 or are_shares:
            expected = tuple(targets.shape) if are_shares else (len(targets), classes)
            if not isinstance(outputs, Tensor) or outputs.shape != expected:
                raise UserError(
                    f"the model {recipe.model.name} returned {_described(outputs)}: "
                    f"logits {list(expected)} are needed"
                )
        return F.cross_entropy(outputs, targets, label_smoothing=recipe.label_smoothing)

    return loss


def _own_loss(path: str) -> Measure:
    function = imported(path, "the loss")

    def loss(outputs: Any, targets: Any) -> Tensor:
        value = function(outputs, targets)
        if not isinstance(value, Tensor) or value.shape or not value.is_floating_point():
            raise UserError(
                f"the loss {path} returned {_described(value)}: "
                "the batch's mean, a floating-point tensor without dimensions, is needed"
            )
        return value

    return loss


def _metric(name: str, classes: int) -> Metric:
    if name == "accuracy":
        return _of_classes(ACCURACY, classes)
    if name == "class_accuracy":
        return _of_classes(class_accuracy(classes), classes)
    if name != "top5":
        return _own_metric(name)
    if classes <= 5:
        raise UserError(f"the metric top5 is 1 for {classes} classes: leave it out of metrics")
    return _of_classes(TOP5, classes)


def _of_classes(metric: Metric, classes: int) -> Metric:
    """Return a metric that refuses what has no right class: a regression, one logit, masks."""

    @torch.no_grad()
    def sums(outputs: Any, targets: Any) -> Tensor:
        if not _are_logits(outputs, classes) or not _are_classes(targets, outputs.shape[1]):
            raise UserError(
                f"the metric {metric.name} needs logits (n, classes) and class numbers (n,), not "
                f"{_described(outputs)} and {_described(targets)}: name a metric of your own "
                '(metrics = ["package.module:function"])'
            )
        return metric.sums(outputs, targets)

    return replace(metric, sums=sums)


def _are_logits(outputs: Any, classes: int) -> bool:
    # A single logit is for two classes: its largest is always the first.
    return isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.shape[1] >= min(2, classes)


def _are_classes(targets: Any, classes: int) -> bool:
    """Tell whether targets are class numbers, or the probabilities of mixed images."""
    if not isinstance(targets, Tensor):
        return False
    if targets.is_floating_point():
        return targets.ndim == 2 and targets.shape[1] == classes > 1
    return targets.ndim == 1


def _own_metric(path: str) -> Metric:
    found = imported(path, "the metric")
    name = path.partition(":")[2]
    if isinstance(found, Metric):
        return replace(found, name=name, sums=_checked_sums(found, path))
    return mean_of(_own_score(found, path), name)


def _checked_sums(metric: Metric, path: str) -> Measure:
    @torch.no_grad()
    def sums(outputs: Any, targets: Tensor) -> Tensor:
        values = metric.sums(outputs, targets)
        if not isinstance(values, Tensor) or values.shape != (metric.size,):
            raise UserError(
                f"the sums of the metric {path} are {_described(values)}: "
                f"its size says a tensor [{metric.size}]"
            )
        return values

    return sums


def _own_score(function: Measure, path: str) -> Measure:

    @torch.no_grad()
    def score(outputs: Any, targets: Any) -> Tensor:
        values = function(outputs, targets)
        samples = len(first_tensor(targets))
        if not isinstance(values, Tensor) or values.shape != (samples,):
            raise UserError(
                f"the metric {path} returned {_described(values)}: "
                f"one score per sample, a tensor [{samples}], is needed"
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
    return mapped(lambda t: t.float() if t.is_floating_point() else t, outputs)
