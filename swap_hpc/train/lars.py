"""LARS, for very large batches."""

from collections.abc import Iterable
from typing import Any

import torch

from swap_hpc.train.tensorwise import Tensorwise


class Lars(Tensorwise):
    """LARS: SGD whose step of each tensor is proportional to the norm of its weights.

    A tensor's gradient g, with the weight decay d of its weights w, is scaled by
    trust |w| / (|g| + d |w|) and then goes through momentum as in torch's SGD. A parameter group
    with `trust` 0 is updated by plain SGD.

    Reference: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv
    1708.03888.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "trust": trust,
        }
        super().__init__(params, defaults)

    def _step(self, p: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        decay, momentum = group["weight_decay"], group["momentum"]
        update = gradient.add(p, alpha=decay)
        if group["trust"]:
            update.mul_(_trust_ratio(p, gradient, decay, group["trust"]))
        buffer = self.state[p].get("momentum_buffer")
        if buffer is None:
            buffer = self.state[p]["momentum_buffer"] = update.clone()
        else:
            buffer.mul_(momentum).add_(update)
        direction = update.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        p.add_(direction, alpha=-group["lr"])


def _trust_ratio(
    p: torch.Tensor, gradient: torch.Tensor, decay: float, trust: float
) -> torch.Tensor:
    """Return the scale of a tensor's gradient, a scalar; 1 for zero weights or a zero gradient."""
    weights = p.norm()
    size = gradient.norm() + decay * weights
    ratio = trust * weights / size
    return torch.where((weights > 0) & (size > 0), ratio, torch.ones_like(weights))
