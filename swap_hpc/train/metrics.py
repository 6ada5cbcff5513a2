"""`Metric`: a figure of a model that is made of sums over samples, and the built-in ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

# (outputs, targets) -> values. The outputs are the model's, in float32 if they are floating-point.
Measure: TypeAlias = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Metric:
    """A figure of a model, made of sums over samples.

    Only the sums pass from batch to batch and between ranks. So a metric needs the same memory for
    any number of samples, and it is the same on any number of ranks.

    Attributes:
        sums: (outputs, targets) of a batch -> (size,), what its samples add to the sums.
        value: (sums over all samples, number of samples) -> the figure.
        size: the number of sums.
        name: its name in tables and files; a recipe replaces it by the name in the import path.
        smaller_is_better: false for an accuracy, true for an error.
        is_share: the figure lies in [0, 1] and is shown in percent.
    """

    sums: Measure
    value: Callable[[Sequence[float], float], float]
    size: int = 1
    name: str = ""
    smaller_is_better: bool = False
    is_share: bool = False


def mean_of(score: Measure, name: str, is_share: bool = False) -> Metric:
    """Return the metric that is the mean of a score.

    Args:
        score: (outputs, targets) -> (n,), one value per sample, larger is better.
        name: of the metric.
        is_share: the scores lie in [0, 1].
    """

    def sums(outputs: Any, targets: Tensor) -> Tensor:
        return score(outputs, targets).sum(dtype=torch.float64)[None]

    return Metric(sums, _mean, name=name, is_share=is_share)


def _mean(sums: Sequence[float], samples: float) -> float:
    return sums[0] / samples


def is_right(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (n,) bool: True where the largest of (n, classes) logits is that of the target."""
    return outputs.argmax(1) == targets


ACCURACY = mean_of(is_right, "accuracy", is_share=True)
