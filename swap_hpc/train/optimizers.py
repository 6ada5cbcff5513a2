"""The optimizers of a recipe."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from swap_hpc.recipe.schema import Optimizer


def build_optimizer(model: nn.Module, recipe: Optimizer) -> torch.optim.Optimizer:
    """What a recipe names, over the parameters of `model`, its learning rate still 0.

    Where the recipe keeps vectors (batch norm's parameters, biases) from weight decay, they are a group of parameters of
    their own; LARS leaves them to plain SGD, too.
    """
    settings: dict[str, Any] = {
        "momentum": recipe.momentum,
        "nesterov": recipe.nesterov,
        "weight_decay": recipe.weight_decay,
    }
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if not recipe.decay_vectors:
        vectors = {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}
        groups = [{"params": [p for p in model.parameters() if p.ndim > 1]}, vectors]
        groups = [group for group in groups if group["params"]]
    if recipe.name == "lars":
        for group in groups:
            group["trust"] = 0.0 if "weight_decay" in group else recipe.trust
        return Lars(groups, lr=0.0, **settings)
    return Sgd(groups, lr=0.0, fused=recipe.fused or None, **settings)


class _Plain(torch.optim.Optimizer):
    """Without guards against torch.compile, which never sees an optimizer here: they import torch._dynamo, seconds of each rank's start."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class Sgd(_Plain, torch.optim.SGD):
    """torch's."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


class Lars(_Plain):
    """SGD whose step of each tensor is as large as its weights: for very large batches.

    A tensor's gradient g, with the weight decay d of its weights w, is scaled by trust |w| / (|g| + d |w|), which then goes
    through momentum as in torch's SGD. `trust` 0: plain SGD. Source: You, Gitman, Ginsburg, "Large Batch Training of
    Convolutional Networks", arXiv 1708.03888.
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
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "trust": trust,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group)

    def _step(self, p: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        decay, momentum = group["weight_decay"], group["momentum"]
        update = gradient.add(p, alpha=decay)
        if group["trust"]:
            weights, size = p.norm(), gradient.norm() + decay * p.norm()
            # a tensor of zeros, or without a gradient, is stepped as by SGD
            update.mul_(
                torch.where(
                    (weights > 0) & (size > 0),
                    group["trust"] * weights / size,
                    torch.ones_like(weights),
                )
            )
        buffer = self.state[p].get("momentum_buffer")
        if buffer is None:
            buffer = self.state[p]["momentum_buffer"] = update.clone()
        else:
            buffer.mul_(momentum).add_(update)
        p.add_(
            update.add(buffer, alpha=momentum) if group["nesterov"] else buffer, alpha=-group["lr"]
        )
