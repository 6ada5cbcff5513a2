"""`loader` and `decode`: our DALI pipelines beside a `DataLoader` with torchvision's transforms."""

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
from swap_hpc.recipe.phase import Phase
from swap_hpc.recipe.schema import Augment, Data, Model, Optimizer
from swap_hpc.train import models
from swap_hpc.train.optimizers import build_optimizer

IMAGES, BATCH = 15_360, 512  # of 32x32 pixels
FILES, FILE_BATCH = 1440, 32  # JPEG of 500x375; enough for what is loaded ahead not to count
AUGMENT = Augment(pad=4, flip=True, cutout=8)
WORKERS = (0, 1, 2, 4)


def in_memory(world: Team, peers: ModuleType) -> list[Comparison]:
    """CIFAR's augmentation of images in memory."""
    generator = np.random.default_rng(0)
    images, labels = (
        generator.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8),
        generator.integers(0, 10, IMAGES),
    )
    dataset = with_statistics(
        Arrays(images, labels), Arrays(images[:1], labels[:1]), tuple(map(str, range(10)))
    )
    device = use_device(world, world, "auto")

    def ours() -> float:
        return images_per_second(
            _training(dataset, AUGMENT, BATCH, device, 2), warm_up=20
        )  # crops on a GPU come ten batches at once

    def transforms(workers: int) -> Callable[[], float]:
        return lambda: images_per_second(
            peers.cifar_loader(images, labels, dataset.mean, dataset.std, AUGMENT, BATCH, workers)
        )

    def vectorised() -> float:
        return images_per_second(
            peers.cifar_batches(
                images, labels, dataset.mean, dataset.std, AUGMENT, BATCH, 2, device.torch
            )
        )

    best = _best(transforms)
    one, other = alternately(ours, transforms(best))
    two, another = alternately(ours, vectorised)
    what = (
        "crops in a GPU's memory"
        if device.torch.type == "cuda"
        else f"DALI in memory, {device.threads} threads"
    )
    consumed = []
    if device.torch.type == "cuda":
        three, eaten = alternately(ours, lambda: _consumed(device))
        consumed = [
            Comparison(
                "loader",
                what,
                "what ResNet-9 of width 64 consumes, bf16",
                "images/s",
                three,
                eaten,
                2.0,
            )
        ]
    return [
        *consumed,
        Comparison(
            "loader",
            what,
            f"DataLoader with v2 transforms, its best: {best} workers",
            "images/s",
            one,
            other,
            4.0,
        ),
        Comparison("loader", what, "vectorised plain torch", "images/s", two, another, 1.0),
    ]


def _consumed(device: Device, steps: int = 50) -> float:
    """Images per second that a model trains on, of one batch again and again."""
    model = (
        models.build(Model(name="resnet9"), 10, 3, 0)
        .to(memory_format=torch.channels_last)
        .to(device.torch)
    )
    images = torch.randn(BATCH, 3, 32, 32, device=device.torch).to(
        memory_format=torch.channels_last
    )
    labels = torch.randint(10, (BATCH,), device=device.torch)
    optimizer = build_optimizer(model, Optimizer())
    for step in range(-5, steps):
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
    """Random resized crops of JPEG files."""
    device = use_device(world, world, "auto")
    with tempfile.TemporaryDirectory() as name:
        root = peers.jpeg_folder(Path(name), FILES)
        dataset = load(
            Data(name="folder", path=root, image_size=((0, 224),), memory_gib=0),
            world,
            device.threads,
        )

        def ours() -> float:
            return images_per_second(_training(dataset, Augment(flip=True), FILE_BATCH, device, 1))

        def folder(workers: int) -> Callable[[], float]:
            return lambda: images_per_second(
                peers.folder_loader(root / "train", dataset.mean, dataset.std, FILE_BATCH, workers)
            )

        best = _best(folder)
        one, other = alternately(ours, folder(best))
    peer = f"ImageFolder and DataLoader, its best: {best} workers"
    return [
        Comparison(
            "decode",
            f"DALI from files, {device.threads} threads",
            peer,
            "images/s",
            one,
            other,
            1.5,
        )
    ]


def _training(
    dataset: Dataset, augment: Augment, batch: int, device: Device, epochs: int
) -> Iterator[Any]:
    picks = training_picks(
        Key(0, Phase.LARGE_BATCH), len(dataset.train), batch, 0, 1, range(epochs)
    )
    return loader.batches(dataset, dataset.train, picks, loader.View(augment), batch, device)


def _best(loader_with: Callable[[int], Callable[[], float]]) -> int:
    """The number of workers with which a loader is fastest."""
    return max(
        (workers for workers in WORKERS if workers <= 2 * (os.cpu_count() or 1)),
        key=lambda workers: loader_with(workers)(),
    )
