"""A torch Dataset of one's own, with a random transform, read by torch's DataLoader.

Start it with: mpirun -n 2 swap-hpc train shifted_digits.toml
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import data

from swap_hpc import Batches, Dataset


class Digits(data.Dataset[tuple[Tensor, Tensor]]):
    """scikit-learn's digits, (1, 8, 8) float32; in training they are `shifted` at random."""

    def __init__(self, rows: slice, shifted: bool):
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images[rows] / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
        self.labels = torch.tensor(labels[rows])
        self.shifted = shifted

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if self.shifted:
            # seeded with each sample: the same on any number of ranks, and in a resumed run
            down, right = torch.randint(3, (2,)).tolist()
            image = F.pad(image, (1, 1, 1, 1))[:, down : down + 8, right : right + 8]
        return image, self.labels[index]


def load(path: Path, workers: int = 0) -> Dataset:
    """Return the data set, read by so many processes."""
    first, last = slice(0, 1400), slice(1400, None)
    # with data.validation = N, N of the training samples are evaluated, as they are
    train, evaluated = Digits(first, shifted=True), Digits(first, shifted=False)
    return Dataset(
        Batches.of(train, workers=workers, evaluated=evaluated),
        Batches.of(Digits(last, shifted=False), workers=workers),
        classes=tuple("0123456789"),
        channels=1,
    )


def build(classes: int, channels: int, width: int) -> nn.Module:
    """Build a network from images (n, channels, 8, 8) to logits (n, classes)."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * width, classes),
    )
