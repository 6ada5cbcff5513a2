"""`Metric`: a figure of a model that is made of sums over samples, and the built-in ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from swap_hpc.errors import UserError

# (outputs, targets) -> values. The outputs are the model's, in float32 if they are floating-point;
# the targets are a tensor (n, ...), or tuples, lists and dictionaries of such tensors.
Measure: TypeAlias = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Metric:
    """A figure of a model, made of sums over samples.

    Only the sums pass from batch to batch and between ranks. So a metric needs the same memory for
    any number of samples, and it is the same on any number of ranks. F1, R2, a correlation or a
    confusion matrix can be made of sums. A figure that needs all outputs at once, such as the exact
    area under the ROC curve, cannot: make it of a histogram's counts, or from the file of
    `swap-hpc evaluate --predictions`.

    Attributes:
        sums: (outputs, targets) of a batch -> (size,), what its samples add to the sums. They are
            added up in float64.
        value: (sums over all samples, number of samples) -> the figure. An ArithmeticError or a
            ValueError, such as a division by zero, says that it is not defined: it is NaN then.
        size: the number of sums.
        name: its name in files; in a recipe it is the name in the import path.
        by_class: (sums, number of samples) -> the figure of each class, None for one without a
            sample; or None: the metric has no such figures.
    """

    sums: Measure
    value: Callable[[Sequence[float], float], float]
    size: int = 1
    name: str = ""
    by_class: Callable[[Sequence[float], float], list[float | None]] | None = None

    def __call__(self, outputs: Any, targets: Tensor) -> float:
        """Return the figure of these samples alone."""
        return self.value(self.sums(outputs, targets).tolist(), len(targets))


def mean_of(score: Measure, name: str) -> Metric:
    """Return the metric that is the mean of a score.

    Args:
        score: (outputs, targets) -> (n,), one value per sample.
        name: of the metric.
    """

    def sums(outputs: Any, targets: Any) -> Tensor:
        return score(outputs, targets).sum(dtype=torch.float64)[None]

    return Metric(sums, _mean, name=name)


def _mean(sums: Sequence[float], samples: float) -> float:
    return sums[0] / samples


def check_plain(outputs: Any, targets: Any) -> None:
    """Raise UserError for outputs or targets that are no tensors: no built-in metric takes them."""
    for nest, what in ((outputs, "outputs"), (targets, "targets")):
        if not isinstance(nest, Tensor):
            raise UserError(
                f"the {what} are a {type(nest).__name__}, and accuracy, top5 and class_accuracy "
                'take tensors: name a metric of your own (metrics = "package.module:function")'
            )


def class_of(targets: Tensor) -> Tensor:
    """Return (n,) class numbers; of mixed images, (n, classes), those of the larger share."""
    return targets.argmax(1) if targets.ndim == 2 and targets.is_floating_point() else targets


def is_right(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (n,) bool: True where the largest of (n, classes) logits is that of the target."""
    check_plain(outputs, targets)
    return outputs.argmax(1) == class_of(targets)


def is_among_5(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (n,) bool: True where the target's is one of the 5 largest of (n, classes) logits."""
    check_plain(outputs, targets)
    return (outputs.topk(5, dim=1).indices == class_of(targets)[:, None]).any(1)


ACCURACY = mean_of(is_right, "accuracy")
TOP5 = mean_of(is_among_5, "top5")


def class_accuracy(classes: int) -> Metric:
    """Return the mean over the classes of each one's share of right answers.

    It is also called balanced accuracy: a rare class counts as much as a common one. A class
    without a sample is left out.
    """

    def sums(outputs: Tensor, targets: Tensor) -> Tensor:
        check_plain(outputs, targets)
        right = outputs.new_zeros(2, classes, dtype=torch.float64)
        known = class_of(targets)
        right[0].index_add_(0, known, is_right(outputs, known).double())
        right[1].index_add_(0, known, torch.ones_like(known, dtype=torch.float64))
        return right.flatten()

    def by_class(sums: Sequence[float], samples: float) -> list[float | None]:
        pairs = zip(sums[:classes], sums[classes:], strict=True)
        return [right / number if number else None for right, number in pairs]

    def value(sums: Sequence[float], samples: float) -> float:
        known = [share for share in by_class(sums, samples) if share is not None]
        return sum(known) / len(known)

    return Metric(sums, value, 2 * classes, "class_accuracy", by_class)
