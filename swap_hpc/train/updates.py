"""What the updates of the weights tell: the gradient's norm, clipped steps and skipped steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Update:
    """What one update leaves on the device, to be read later; the same on all ranks of the team."""

    norm: Tensor | None = None  # scalar, 2-norm of the gradient before clipping; None: not clipped
    clip_norm: float | None = None  # the largest norm that is not clipped
    scales: Tensor | None = None  # (2,), the loss scale before and after it; None: not scaled


@dataclass(frozen=True)
class Read:
    """The numbers of an update."""

    norm: float | None
    is_clipped: bool
    is_skipped: bool
    loss_scale: float | None  # after it


def read(updates: Sequence[Update]) -> list[Read]:
    """Return the numbers of some updates of a phase; the host waits for the device once."""
    norms = _values([update.norm for update in updates])
    scales = _values([update.scales for update in updates])
    numbers = []
    for update, norm, scale in zip(updates, norms, scales, strict=True):
        is_skipped = scale is not None and scale[1] < scale[0]
        limit = update.clip_norm
        is_clipped = limit is not None and norm > limit and not is_skipped
        numbers.append(Read(norm, is_clipped, is_skipped, scale[1] if scale else None))
    return numbers


def _values(tensors: Sequence[Tensor | None]) -> list[Any]:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(there).tolist() if there else [None] * len(tensors)


@dataclass(frozen=True)
class Updates:
    """Sums over the updates of an epoch so far; the same on all ranks of the team."""

    taken: int = 0  # steps that were not skipped
    norms: float | None = None  # sum of the gradients' norms before clipping; None: no clipping
    largest_norm: float = 0.0
    clipped: int = 0  # steps
    skipped: int = 0  # steps in which a gradient overflowed float16
    loss_scale: float | None = None  # after the last step; None: losses are not scaled

    @property
    def mean_norm(self) -> float | None:
        """The mean norm of the gradient before clipping; None where no step was taken."""
        return self.norms / self.taken if self.norms is not None and self.taken else None

    def plus(self, update: Read) -> "Updates":
        """Return these sums with one more update; the norm of a skipped one does not count."""
        norms, largest = self.norms, self.largest_norm
        if update.norm is not None:
            norm = 0.0 if update.is_skipped else update.norm
            norms, largest = (norms or 0.0) + norm, max(largest, norm)
        return Updates(
            taken=self.taken + (not update.is_skipped),
            norms=norms,
            largest_norm=largest,
            clipped=self.clipped + update.is_clipped,
            skipped=self.skipped + update.is_skipped,
            loss_scale=update.loss_scale,
        )


NO_UPDATES = Updates()  # of an epoch that begins
