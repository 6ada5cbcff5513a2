"""LAMB, for very large batches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from swap_hpc.train.tensorwise import Tensorwise


class Lamb(Tensorwise):
    """LAMB: Adam whose step of each tensor is as long as the tensor's weights.

    With Adam's direction r = m / (sqrt(v) + eps), where m and v are the bias-corrected means of the
    gradient and of its square, and with the weight decay d of the weights w, the step is
    lr |w| / |r + d w| (r + d w). The ratio of the norms is 1 where one of them is 0, and in a
    parameter group with `layer_adaptation` false, which is updated as by AdamW.

    Reference: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76
    minutes", arXiv 1904.00962, algorithm 2, with the identity as its function phi.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        layer_adaptation: bool = True,
    ):
        if not all(0 <= beta < 1 for beta in betas) or len(betas) != 2:
            raise ValueError(f"betas are two numbers from 0 to below 1, not {betas}")
        if eps < 0:
            raise ValueError(f"eps is at least 0, not {eps}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "layer_adaptation": layer_adaptation,
        }
        super().__init__(params, defaults)

    def _step(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(p)
            state["mean_of_squares"] = torch.zeros_like(p)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["mean"].lerp_(gradient, 1 - beta1)
        squares = state["mean_of_squares"].mul_(beta2)
        squares.addcmul_(gradient, gradient, value=1 - beta2)
        unbiased = squares / (1 - beta2 ** state["step"])
        update = mean / (1 - beta1 ** state["step"]) / (unbiased.sqrt_() + group["eps"])
        update.add_(p, alpha=group["weight_decay"])
        if group["layer_adaptation"]:
            update.mul_(_ratio_of_norms(p, update))
        p.add_(update, alpha=-group["lr"])


def _ratio_of_norms(p: Tensor, update: Tensor) -> Tensor:
    """Return |p| / |update|, a scalar; 1 where one of the norms is 0."""
    weights, size = p.norm(), update.norm()
    is_defined = (weights > 0) & (size > 0)
    return torch.where(is_defined, weights / size, torch.ones_like(weights))
