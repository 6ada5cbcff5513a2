"""Optimizers of a user's own, for recipes that name them by import path."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Odd(torch.optim.Optimizer):
    """An optimizer that needs all kinds of state: each piece changes the next step."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1, scale: float = 1.0):
        if lr <= 0:
            raise ValueError("a learning rate is above 0")  # some classes say so
        super().__init__(params, {"lr": lr, "scale": scale})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["scale"] *= 0.97
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group["lr"] * group["scale"])

    def _step(self, p: Tensor, gradient: Tensor, rate: float) -> None:
        state = self.state[p]
        if not state:
            state["count"] = 0
            state["history"] = {"mean": torch.zeros_like(p), "last": [gradient.clone(), None]}
            state["norm"] = (torch.zeros((), dtype=torch.float64), "float64 beside float32")
        state["count"] += 1
        mean, last = state["history"]["mean"], state["history"]["last"]
        mean.mul_(0.9).add_(gradient)
        norm = state["norm"][0]
        norm.add_(mean.double().norm() / 3)
        p.sub_(mean + 0.1 * last[0], alpha=rate / (state["count"] ** 0.5 + float(norm)))
        last[0], last[1] = gradient.clone(), state["count"]


class Closing(torch.optim.Optimizer):
    """An optimizer that computes the loss itself."""

    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        return closure()


class ScheduleFree(torch.optim.SGD):
    """An optimizer that wants to know when the model is evaluated."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def not_a_class() -> None: ...
