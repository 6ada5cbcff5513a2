"""A table: the breast-cancer data that come with scikit-learn, and a small network.

Start it with: mpirun -n 2 swap-hpc train table.toml
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.utils.data import TensorDataset

from swap_hpc import Batches, Dataset


def load(path: Path, test_every: int = 4) -> Dataset:
    """Return rows of 30 features, float32, and their classes; every `test_every`-th row tests."""
    table = load_breast_cancer()
    tests = np.arange(len(table.target)) % test_every == 0
    features = table.data - table.data[~tests].mean(0)
    features /= features[~tests].std(0)

    def split(rows: np.ndarray) -> Batches:
        inputs = torch.tensor(features[rows], dtype=torch.float32)
        return Batches.of(TensorDataset(inputs, torch.tensor(table.target[rows])))

    return Dataset(split(~tests), split(tests), classes=tuple(table.target_names))


def build(classes: int, channels: int, width: int) -> nn.Module:
    """Build a network from features (n, 30) to logits (n, classes)."""
    return nn.Sequential(
        nn.Linear(30, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, classes)
    )
