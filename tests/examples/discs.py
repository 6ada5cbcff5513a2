"""Segmentation with a model, data, a loss and a metric that are not the package's.

Start it with: mpirun -n 2 swap-hpc train discs.toml
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from torch import Tensor, nn
from torch.nn import functional as F

from swap_hpc import Dataset, Graph
from swap_hpc.data import Picks


def load(path: Path, samples: int = 600, size: int = 32) -> Dataset:
    """Make images of discs on noise, and masks of the discs."""
    train_arrays = discs(samples, size, seed=0)
    test_arrays = discs(samples // 3, size, seed=1)
    train = Graph(samples, partial(graph, *train_arrays))
    test = Graph(samples // 3, partial(graph, *test_arrays))
    return Dataset(train, test, classes=("background", "disc"), channels=3)


def discs(number: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw images and masks.

    Returns:
        Images (number, size, size, 3) uint8 and masks (number, size, size, 1) uint8, 1 in the disc.
    """
    generator = np.random.default_rng(seed)
    centres = generator.uniform(size * 0.3, size * 0.7, (2, number, 1, 1))
    row, column = np.mgrid[:size, :size][:, None] - centres
    radius = generator.uniform(size * 0.12, size * 0.3, (number, 1, 1))
    masks = (row**2 + column**2 < radius**2).astype(np.uint8)[..., None]
    images = generator.normal(110 + 40 * masks, 45, (number, size, size, 3))
    return images.clip(0, 255).astype(np.uint8), masks


def graph(
    images: np.ndarray, masks: np.ndarray, picks: Iterator[Picks], training: bool
) -> tuple[Any, Any]:
    """Define a DALI graph of images and masks, mirrored together.

    All random numbers come from `picks`, so that a resumed run makes the same batches.
    """

    def feed() -> Iterator[tuple[np.ndarray, ...]]:
        for pick in picks:
            coin = np.ones(len(pick.indices)) if pick.draws is None else pick.draws[:, 2]
            mirrored = (coin < 0.5).astype(np.int32)
            yield images[pick.indices], masks[pick.indices], mirrored

    image, mask, mirror = fn.external_source(feed(), num_outputs=3, batch=True)
    image = fn.crop_mirror_normalize(
        image,
        mirror=mirror,
        mean=3 * [115.0],
        std=3 * [50.0],
        dtype=types.FLOAT,
        output_layout="CHW",
    )
    return image, fn.cast(fn.flip(mask, horizontal=mirror), dtype=types.INT64)


def build(classes: int, channels: int, width: int = 8) -> nn.Module:
    """Build a network from images (n, channels, H, W) to logits (n, classes, H, W)."""

    def block(inside: int, outside: int) -> nn.Sequential:
        convolution = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU())

    return nn.Sequential(
        block(channels, width),
        nn.MaxPool2d(2),
        block(width, 2 * width),
        block(2 * width, 2 * width),
        nn.Upsample(scale_factor=2),
        block(2 * width, width),
        nn.Conv2d(width, classes, 1),
    )


def loss(outputs: Tensor, masks: Tensor) -> Tensor:
    """Return the mean cross-entropy of all pixels of a batch."""
    return F.cross_entropy(outputs, masks[..., 0])


def overlap(outputs: Tensor, masks: Tensor) -> Tensor:
    """Return the intersection over union of each image's disc, (n,)."""
    found, disc = outputs.argmax(1) == 1, masks[..., 0] == 1
    intersection = (found & disc).sum((1, 2))
    union = (found | disc).sum((1, 2))
    return intersection / union.clamp(min=1)
