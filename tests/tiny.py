"""Small jobs for tests: a few images, a few thousand weights, a fraction of a second."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swap_hpc.data.dataset import Dataset, with_statistics
from swap_hpc.data.splits import Arrays
from swap_hpc.parallel.devices import Device
from swap_hpc.parallel.tensors import real
from swap_hpc.recipe.loading import parse
from swap_hpc.recipe.schema import Recipe
from swap_hpc.train import models
from swap_hpc.train.job import Job

CPU = Device(torch.device("cpu"), threads=1)


def recipe(**overrides: Any) -> Recipe:
    """Return a recipe for `dataset()`; `large_batch={"epochs": 3}` overrides one field."""
    fields: dict[str, Any] = {
        "groups": 1,
        "model": {"name": "tiny:plain"},
        "data": {"name": "synthetic"},
        "augment": {"pad": 1, "flip": True, "cutout": 2},
        "large_batch": {"batch_size": 24, "epochs": 2, "learning_rate": [[0, 0.05], [2, 0.02]]},
        "refine": {"batch_size": 12, "epochs": 1, "learning_rate": [[0, 0.05], [1, 0.0]]},
        "batchnorm": {"batch_size": 20, "samples": 90},
        "evaluate": {"batch_size": 7},
        "checkpoint": {"min_seconds": 0},
        # after an error a watchdog stays, and would end the tests' own process
        "watchdog": {"minutes": 0},
    }
    for section, value in overrides.items():
        is_section = isinstance(value, dict) and section in fields
        fields[section] = fields[section] | value if is_section else value
    return parse(fields)


def dataset(train: int = 101, test: int = 37, size: int = 8, classes: int = 3) -> Dataset:
    """Return random images, (size, size, 3), whose brightness shows their class.

    Their numbers are odd, so that batches and ranks do not divide them evenly.
    """
    generator = np.random.Generator(np.random.Philox(7))

    def split(samples: int) -> Arrays:
        labels = generator.integers(0, classes, samples)
        noise = generator.integers(0, 120, (samples, size, size, 3))
        images = noise + 60 * labels[:, None, None, None]
        return Arrays(images.astype(np.uint8), labels.astype(np.int64))

    return with_statistics(split(train), split(test), tuple("abcdefghij"[:classes]))


def job(**overrides: Any) -> Job:
    return Job(recipe(**overrides), dataset(), CPU)


def model(job: Job) -> nn.Module:
    return models.build(job.recipe.model, 3, 3, job.recipe.seed)


def plain(classes: int, channels: int) -> nn.Module:
    """Return a model without batch norm: N ranks then compute what one rank computes."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def batch_normed(classes: int, channels: int) -> nn.Module:
    """Return a model with batch norm and nothing random."""
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(128, classes),
    )


def normed(classes: int, channels: int) -> nn.Module:
    """Return a model with two batch norms in a row and dropout.

    A refresh of batch norm must be without dropout; the second layer sees the first one's output.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def weights(model: nn.Module) -> Tensor:
    """Return the state dict as one float64 vector; a complex number gives two elements."""
    return torch.cat([real(t.detach()).flatten().double() for t in model.state_dict().values()])
