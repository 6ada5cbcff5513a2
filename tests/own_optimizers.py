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


class Counting(torch.optim.SGD):
    """An optimizer whose step depends on a number that its own `state_dict` returns."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1):
        super().__init__(params, lr=lr, momentum=0.9)
        self.count = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            group["lr"] /= self.count
        super().step()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.count = state_dict["count"]


class Forgetful(Counting):
    """The same, whose number is not saved."""

    state_dict = torch.optim.SGD.state_dict
    load_state_dict = torch.optim.SGD.load_state_dict


class Careless(Counting):
    """The same, whose number is saved and not loaded."""

    load_state_dict = torch.optim.SGD.load_state_dict


class Fixed(torch.optim.Optimizer):
    """An optimizer that keeps the learning rate that it was made with."""

    def __init__(self, params: Iterable[Any], lr: float = 0.1):
        super().__init__(params, {"lr": lr})
        self.lr = lr

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=self.lr)


class Noisy(torch.optim.SGD):
    """An optimizer that adds noise to the weights, as stochastic gradient Langevin dynamics."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p), alpha=group["lr"])


class Closing(torch.optim.Optimizer):
    """An optimizer that computes the loss itself."""

    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        return closure()


class ScheduleFree(torch.optim.SGD):
    """An optimizer that wants to know when the model is evaluated."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def not_a_class() -> None: ...
