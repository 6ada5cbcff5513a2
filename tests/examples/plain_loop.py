"""A plain training loop in one process. swap_loop.py adds SWAP to it in seven lines."""

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
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # from 0..16 to -1..1
    labels = torch.from_numpy(digits.target)
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def batches(samples: Samples, size: int, epochs: int, seed: int) -> Iterator[Samples]:
    """Yield the shuffled whole batches of several epochs."""
    images, labels = samples
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        order = generator.permutation(len(labels))
        for start in range(0, len(order) - size + 1, size):
            which = order[start : start + size]
            yield images[which], labels[which]


def train(model: nn.Module, stream: Iterator[Samples], rate: float) -> None:
    """Train by SGD with momentum, while the learning rate falls linearly to zero."""
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
    images, labels = samples
    predicted = model.eval()(images).argmax(1)
    return (predicted == labels).float().mean().item()


def main(batches: Any = batches) -> nn.Module:
    samples, test = load()
    torch.manual_seed(0)
    model = build()
    train(model, batches(samples, size=200, epochs=10, seed=0), rate=0.2)
    print(f"accuracy {accuracy(model, test):.4f}")
    return model


if __name__ == "__main__":
    main()
