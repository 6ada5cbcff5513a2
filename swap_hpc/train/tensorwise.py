"""What LARS and LAMB have in common: each tensor of weights is updated by itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Tensorwise(torch.optim.Optimizer):
    """An optimizer that updates one tensor after the other; a subclass says how."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; `closure` is ignored."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group)

    def _step(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Update a parameter in place.

        Args:
            p: The parameter.
            gradient: Of the same shape.
            group: The settings of its parameter group, with the learning rate `lr`.
        """
        raise NotImplementedError
