"""A plain training loop in one process. swap_loop.py is the same with SWAP: seven lines more."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

Samples = tuple[Tensor, Tensor]  # images (n, 1, 8, 8) float32, labels (n,) int64


def load() -> tuple[Samples, Samples]:
    digits = load_digits()
    images, labels = (
        torch.from_numpy(digits.images).float()[:, None] / 8 - 1,
        torch.from_numpy(digits.target),
    )
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def batches(samples: Samples, size: int, epochs: int, seed: int) -> Iterator[Samples]:
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        order = generator.permutation(len(samples[1]))
        for start in range(0, len(order) - size + 1, size):
            yield samples[0][order[start : start + size]], samples[1][order[start : start + size]]


def train(model: nn.Module, stream: Iterator[Samples], rate: float) -> None:
    """SGD with momentum, its learning rate falling to zero."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = list(stream)
    model.train()
    for number, (images, labels) in enumerate(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - number / len(steps))
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, samples: Samples) -> float:
    return (model.eval()(samples[0]).argmax(1) == samples[1]).float().mean().item()


def main(batches: Any = batches) -> nn.Module:
    samples, test = load()
    torch.manual_seed(0)
    model = build()
    train(model, batches(samples, size=200, epochs=10, seed=0), rate=0.2)
    print(f"accuracy {accuracy(model, test):.4f}")
    return model


if __name__ == "__main__":
    main()
