"""The alternatives that benches compare with.

They are what a careful user would write with torch, torchvision and MPI alone.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2


class _Cifar(Dataset):
    """Images in memory, (N, H, W, C) uint8, that are transformed one by one.

    They are turned to (C, H, W) once.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, transform: Callable[[Tensor], Tensor]
    ):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


class Cutout(nn.Module):
    """A square of zeros at a random place of a normalised image."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        y = int(torch.randint(height - self.size + 1, ()))
        x = int(torch.randint(width - self.size + 1, ()))
        image[..., y : y + self.size, x : x + self.size] = 0
        return image


def _normalise(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    """Return the last transforms: uint8 to float32, normalised by `mean` and `std` in [0, 255]."""
    in_unit_range = [m / 255 for m in mean], [s / 255 for s in std]
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*in_unit_range)]


def cifar_loader(
    images: np.ndarray,
    labels: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    augment: Any,
    batch: int,
    workers: int,
) -> Iterator[Any]:
    """Make two epochs of shuffled batches; the workers live on between them.

    Args:
        images: (N, H, W, C) uint8.
        labels: (N,).
        mean: of each channel.
        std: of each channel.
        augment: `pad` and `cutout` in pixels.
        batch: samples of a batch.
        workers: processes that load; 0 loads in this one.
    """
    transform = v2.Compose(
        [
            v2.RandomCrop(images.shape[1:3], padding=augment.pad, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
            *_normalise(mean, std),
            Cutout(augment.cutout),
        ]
    )
    loader = DataLoader(
        _Cifar(images, labels, transform),
        batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=workers > 0,
    )
    for _ in range(2):
        yield from loader


def cifar_batches(
    images: np.ndarray,
    labels: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    augment: Any,
    batch: int,
    epochs: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Make shuffled batches by torch's operators, each augmented as a whole.

    All images are padded once, and kept in the device's memory. The arguments are those of
    `cifar_loader`.
    """
    pad, cut = augment.pad, augment.cutout
    height, width = images.shape[1:3]
    borders = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    padded = torch.from_numpy(np.pad(images, borders, mode="reflect")).to(device)
    targets = torch.from_numpy(labels).to(device)
    shift, scale = torch.tensor(mean, device=device), 1 / torch.tensor(std, device=device)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    for _ in range(epochs):
        order = torch.randperm(len(labels), device=device)
        for start in range(0, len(order) - batch + 1, batch):
            mine = order[start : start + batch]
            y, x = torch.randint(2 * pad + 1, (2, batch, 1), device=device)
            mirrored = torch.rand(batch, 1, device=device) < 0.5
            across = columns.expand(batch, width)
            across = torch.where(mirrored, across.flip(1), across)
            # (n, H, W, C): one index for the image, one for its rows, one for its columns
            crop = padded[mine[:, None, None], (y + rows)[:, :, None], (x + across)[:, None, :]]
            out = (crop.float() - shift) * scale
            top, left = torch.randint(height - cut + 1, (2, batch, 1), device=device)
            in_rows = (rows >= top) & (rows < top + cut)
            in_columns = (columns >= left) & (columns < left + cut)
            hole = in_rows[:, :, None] & in_columns[:, None, :]
            yield out.masked_fill_(hole[..., None], 0).permute(0, 3, 1, 2), targets[mine]


def jpeg_folder(root: Path, files: int) -> Path:
    """Write JPEG files of 500x375 pixels in ten classes, and return `root`.

    There are `files` in `train` and ten in `test`. They are smooth with some noise, as photographs
    are, so that they decode as fast.
    """
    generator = np.random.default_rng(0)
    for split, number in (("train", files), ("test", 10)):
        for i in range(number):
            folder = root / split / str(i % 10)
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            smooth = coarse.resize((500, 375), Image.Resampling.BICUBIC)
            noise = generator.integers(-12, 13, (375, 500, 1))
            pixels = (np.asarray(smooth, np.int16) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=90)
    return root


def folder_loader(
    folder: Path, mean: Sequence[float], std: Sequence[float], batch: int, workers: int
) -> Iterator[Any]:
    """Make one epoch of shuffled batches of random resized crops of image files."""
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            *_normalise(mean, std),
        ]
    )
    yield from DataLoader(
        ImageFolder(str(folder), transform),
        batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
    )


def store_file() -> str:
    """Return the path of a new file, through which the ranks of a process group find each other."""
    # Not created here: torch creates it, and a file that is there already would be a used store.
    return tempfile.mktemp(prefix="ddp-")


@contextmanager
def process_group(rank: int, size: int, store: str, backend: str) -> Iterator[None]:
    """Let torch's distributed functions work between the ranks that open the same `store`."""
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    yield
    dist.destroy_process_group()


def ddp_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    steps: int,
    clock: Any,
) -> float:
    """Return the seconds of `steps` steps with DistributedDataParallel on one batch.

    Two steps before them are not counted. A `process_group` has to be open.
    """
    with warnings.catch_warnings():
        # `broadcast_buffers` is deprecated, but torch for CUDA 12 does not have its successor yet.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, broadcast_buffers=False
        )
    for number in range(-2, steps):
        if number == 0:
            clock.start()
        optimizer.zero_grad()
        F.cross_entropy(wrapped(images), labels).backward()
        optimizer.step()
    return float(clock.seconds())


def bare_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> int:
    """Train on all batches, and return the number of images."""
    seen = 0
    model.train()
    for images, labels in batches:
        optimizer.zero_grad()
        with autocast():
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        seen += len(labels)
    return seen


def bare_allreduce(comm: Any, host: Tensor, device: Tensor | None) -> None:
    """Sum a float32 buffer in place over the ranks of an mpi4py communicator.

    Args:
        comm: the communicator.
        host: the buffer on the host.
        device: a buffer on a GPU, which is copied to `host` before and back after; None without.
    """
    from mpi4py import MPI

    if device is not None:
        host.copy_(device)
    comm.Allreduce(MPI.IN_PLACE, host.numpy(), op=MPI.SUM)
    if device is not None:
        device.copy_(host)


def update_bn(batches: Sequence[Tensor], model: nn.Module) -> None:
    """Estimate a model's batch-norm statistics anew, in place, by torch's own function."""
    torch.optim.swa_utils.update_bn(batches, model)
