"""Segmentation, with a model, data, a loss and a metric of one's own: mpirun -n 2 swap-hpc train discs.toml"""

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
    """Discs on noise, and where they are."""
    train, test = (
        Graph(number, partial(graph, *discs(number, size, seed)))
        for seed, number in enumerate((samples, samples // 3))
    )
    return Dataset(train, test, classes=("background", "disc"), channels=3)


def discs(number: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (number, size, size, 3) uint8 and masks (number, size, size, 1) uint8: 1 in the disc."""
    generator = np.random.default_rng(seed)
    row, column = np.mgrid[:size, :size][:, None] - generator.uniform(
        size * 0.3, size * 0.7, (2, number, 1, 1)
    )
    radius = generator.uniform(size * 0.12, size * 0.3, (number, 1, 1))
    masks = (row**2 + column**2 < radius**2).astype(np.uint8)[..., None]
    images = generator.normal(110 + 40 * masks, 45, (number, size, size, 3))
    return images.clip(0, 255).astype(np.uint8), masks


def graph(
    images: np.ndarray, masks: np.ndarray, picks: Iterator[Picks], training: bool
) -> tuple[Any, Any]:
    """DALI's graph: image and mask, mirrored together. What is random comes from `picks`, so that a run can go on where it stopped."""

    def feed() -> Iterator[tuple[np.ndarray, ...]]:
        for pick in picks:
            mirrored = (
                pick.draws[:, 2] < 0.5 if pick.draws is not None else np.zeros(len(pick.indices))
            )
            yield images[pick.indices], masks[pick.indices], mirrored.astype(np.int32)

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
    """(n, channels, H, W) -> (n, classes, H, W) logits."""

    def block(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()
        )

    return nn.Sequential(
        block(channels, width), nn.MaxPool2d(2), block(width, 2 * width), block(2 * width, 2 * width), nn.Upsample(scale_factor=2),
        block(2 * width, width), nn.Conv2d(width, classes, 1),
    )  # fmt: skip


def loss(outputs: Tensor, masks: Tensor) -> Tensor:
    """The mean over the batch's pixels."""
    return F.cross_entropy(outputs, masks[..., 0])


def overlap(outputs: Tensor, masks: Tensor) -> Tensor:
    """(n,): intersection over union of the disc's pixels, of each image."""
    found, disc = outputs.argmax(1) == 1, masks[..., 0] == 1
    return (found & disc).sum((1, 2)) / (found | disc).sum((1, 2)).clamp(min=1)
