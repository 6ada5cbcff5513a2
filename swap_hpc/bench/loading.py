"""`loader` and `decode`: DALI pipelines beside a `DataLoader` with torchvision's transforms."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from swap_hpc.bench.measure import Comparison, alternately, images_per_second, wait_for_gpu
from swap_hpc.data import load, loader
from swap_hpc.data.dataset import Dataset, with_statistics
from swap_hpc.data.sampling import Key, training_picks
from swap_hpc.data.splits import Arrays
from swap_hpc.parallel.devices import Device, use_device
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.augment import Augment
from swap_hpc.recipe.inputs import Data, Model
from swap_hpc.recipe.optimizer import Optimizer
from swap_hpc.recipe.phase import Phase
from swap_hpc.recipe.wording import count
from swap_hpc.train import models
from swap_hpc.train.optimizers import build_optimizer

IMAGES, BATCH = 15_360, 512  # of 32x32 pixels
# JPEG of 500x375 pixels; so many files that what is loaded ahead of the clock does not count
FILES, FILE_BATCH = 1440, 32
CROPS = Augment(crop_area=(0.08, 1.0), flip=True)
AUGMENT = Augment(pad=4, flip=True, cutout=8)
WORKERS = (0, 1, 2, 4)  # that are tried for a DataLoader


def in_memory(world: Team, peers: ModuleType) -> list[Comparison]:
    """Compare CIFAR's augmentation of images in memory with a DataLoader and with plain torch.

    On a GPU, also with what a model consumes.
    """
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, 10, IMAGES)
    classes = tuple(map(str, range(10)))
    test = Arrays(images[:1], labels[:1])
    dataset = with_statistics(Arrays(images, labels), test, classes)
    mean, std = dataset.mean, dataset.std
    device = use_device(world, world, "auto")

    def ours() -> float:
        # On a GPU, crops are made for ten batches at once: warm up beyond the first ten.
        return images_per_second(_training(dataset, AUGMENT, BATCH, device, 2), warm_up=20)

    def transforms(workers: int) -> Callable[[], float]:
        def measure() -> float:
            return images_per_second(
                peers.cifar_loader(images, labels, mean, std, AUGMENT, BATCH, workers)
            )

        return measure

    def vectorised() -> float:
        return images_per_second(
            peers.cifar_batches(images, labels, mean, std, AUGMENT, BATCH, 2, device.torch)
        )

    best = _best(transforms)
    against_loader = alternately(ours, transforms(best))
    against_torch = alternately(ours, vectorised)
    what = f"DALI in memory, {count(device.threads, 'thread')}"
    comparisons = []
    if device.torch.type == "cuda":
        what = "crops in a GPU's memory"
        consumer = "what ResNet-9 of width 64 consumes, bf16"
        against_model = alternately(ours, lambda: _consumed(device))
        comparisons.append(
            Comparison("loader", what, consumer, "images/s", *against_model, bar=2.0)
        )
    loader_name = f"DataLoader with v2 transforms, its best: {count(best, 'worker')}"
    return [
        *comparisons,
        Comparison("loader", what, loader_name, "images/s", *against_loader, bar=4.0),
        Comparison("loader", what, "vectorised plain torch", "images/s", *against_torch, bar=1.0),
    ]


def _consumed(device: Device, steps: int = 50) -> float:
    """Return the images per second that ResNet-9 trains on, of one batch again and again."""
    model = models.build(Model(name="resnet9"), 10, 3, 0)
    model = model.to(memory_format=torch.channels_last).to(device.torch)
    images = torch.randn(BATCH, 3, 32, 32, device=device.torch)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,), device=device.torch)
    optimizer = build_optimizer(model, Optimizer())
    for step in range(-5, steps):  # five steps to warm up
        if step == 0:
            wait_for_gpu()
            begin = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.torch.type, torch.bfloat16):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
    wait_for_gpu()
    return steps * BATCH / (time.perf_counter() - begin)


def from_files(world: Team, peers: ModuleType) -> list[Comparison]:
    """Compare random resized crops of JPEG files with `ImageFolder` and a DataLoader."""
    device = use_device(world, world, "auto")
    with tempfile.TemporaryDirectory() as name:
        root = peers.jpeg_folder(Path(name), FILES)
        # memory_gib=0: every epoch decodes the files again.
        data = Data(name="folder", path=root, image_size=((0, 224),), memory_gib=0)
        dataset = load(data, world, device.threads)
        mean, std = dataset.mean, dataset.std

        def ours() -> float:
            return images_per_second(_training(dataset, CROPS, FILE_BATCH, device, 1))

        def folder(workers: int) -> Callable[[], float]:
            def measure() -> float:
                return images_per_second(
                    peers.folder_loader(root / "train", mean, std, FILE_BATCH, workers)
                )

            return measure

        best = _best(folder)
        against_folder = alternately(ours, folder(best))
    what = f"DALI from files, {count(device.threads, 'thread')}"
    folder_name = f"ImageFolder and DataLoader, its best: {count(best, 'worker')}"
    return [Comparison("decode", what, folder_name, "images/s", *against_folder, bar=1.5)]


def _training(
    dataset: Dataset, augment: Augment, batch: int, device: Device, epochs: int
) -> Iterator[Any]:
    """Make the batches of phase 1 that a single rank takes."""
    key = Key(0, Phase.LARGE_BATCH)
    picks = training_picks(key, len(dataset.train), batch, 0, 1, range(epochs))
    return loader.batches(dataset, dataset.train, picks, loader.View(augment), batch, device)


def _best(loader_with: Callable[[int], Callable[[], float]]) -> int:
    """Return the number of workers with which a DataLoader is fastest.

    Args:
        loader_with: gives for a number of workers what measures images per second with them.
    """
    most = 2 * (os.cpu_count() or 1)
    sensible = (workers for workers in WORKERS if workers <= most)
    return max(sensible, key=lambda workers: loader_with(workers)())
