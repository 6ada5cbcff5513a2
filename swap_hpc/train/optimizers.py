"""The optimizers of a recipe: SGD and LARS."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from swap_hpc.recipe.training import Optimizer


def build_optimizer(model: nn.Module, recipe: Optimizer) -> torch.optim.Optimizer:
    """Return the recipe's optimizer over the parameters of `model`, with a learning rate of 0.

    Without `recipe.decay_vectors`, batch-norm parameters and biases form their own parameter
    group, which has no weight decay and which LARS updates as SGD does.
    """
    settings: dict[str, Any] = {
        "momentum": recipe.momentum,
        "nesterov": recipe.nesterov,
        "weight_decay": recipe.weight_decay,
    }
    groups = _parameter_groups(model, recipe)
    if recipe.name == "lars":
        for group in groups:
            group["trust"] = 0.0 if "weight_decay" in group else recipe.trust
        return Lars(groups, lr=0.0, **settings)
    # None, unlike False, leaves torch its faster loop over several tensors (foreach).
    return Sgd(groups, lr=0.0, fused=recipe.fused or None, **settings)


def _parameter_groups(model: nn.Module, recipe: Optimizer) -> list[dict[str, Any]]:
    """Return torch's parameter groups; only that of the vectors sets its own weight decay."""
    parameters = list(model.parameters())
    if recipe.decay_vectors:
        return [{"params": parameters}]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class _Plain(torch.optim.Optimizer):
    """An optimizer without torch's guards against torch.compile.

    The guards import torch._dynamo, which adds seconds to the start of each rank. They are not
    needed: only the forward and backward pass is ever compiled.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class Sgd(_Plain, torch.optim.SGD):
    """torch's SGD."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class Lars(_Plain):
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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; `closure` is ignored."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group)

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
