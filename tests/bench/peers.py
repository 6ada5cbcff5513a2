"""What a careful user would write instead, with torch, torchvision and MPI alone."""

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
    """Images that were turned to (C, H, W) once, transformed one by one."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, transform: Callable[[Tensor], Tensor]
    ):
        self.images, self.labels, self.transform = (
            torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            labels.tolist(),
            transform,
        )

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
        y, x = (
            int(torch.randint(height - self.size + 1, ())),
            int(torch.randint(width - self.size + 1, ())),
        )
        image[..., y : y + self.size, x : x + self.size] = 0
        return image


def cifar_loader(
    images: np.ndarray,
    labels: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    augment: Any,
    batch: int,
    workers: int,
) -> Iterator[Any]:
    """Two epochs of shuffled batches; the workers live on between them."""
    transform = v2.Compose(
        [
            v2.RandomCrop(images.shape[1:3], padding=augment.pad, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([m / 255 for m in mean], [s / 255 for s in std]),
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
    """The whole epoch's padded images in memory; crops gathered, flipped, normalised and cut out a batch at a time."""
    pad, cut = augment.pad, augment.cutout
    height, width = images.shape[1:3]
    padded = torch.from_numpy(
        np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    ).to(device)
    targets = torch.from_numpy(labels).to(device)
    shift, scale = torch.tensor(mean, device=device), 1 / torch.tensor(std, device=device)
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    for _ in range(epochs):
        order = torch.randperm(len(labels), device=device)
        for start in range(0, len(order) - batch + 1, batch):
            mine = order[start : start + batch]
            y, x = torch.randint(2 * pad + 1, (2, batch, 1), device=device)
            across = columns.expand(batch, width)
            across = torch.where(torch.rand(batch, 1, device=device) < 0.5, across.flip(1), across)
            crop = padded[
                mine[:, None, None], (y + rows)[:, :, None], (x + across)[:, None, :]
            ]  # (n, H, W, C)
            out = (crop.float() - shift) * scale
            top, left = torch.randint(height - cut + 1, (2, batch, 1), device=device)
            hole = ((rows >= top) & (rows < top + cut))[:, :, None] & (
                (columns >= left) & (columns < left + cut)
            )[:, None, :]
            yield out.masked_fill_(hole[..., None], 0).permute(0, 3, 1, 2), targets[mine]


def jpeg_folder(root: Path, files: int) -> Path:
    """`train` with that many JPEG files of 500x375 in ten classes, smooth with some noise, as photographs are; `test` with ten."""
    generator = np.random.default_rng(0)
    for split, number in (("train", files), ("test", 10)):
        for i in range(number):
            folder = root / split / str(i % 10)
            folder.mkdir(parents=True, exist_ok=True)
            smooth = Image.fromarray(
                generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            ).resize((500, 375), Image.Resampling.BICUBIC)
            noisy = np.asarray(smooth, np.int16) + generator.integers(-12, 13, (375, 500, 1))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
                folder / f"{i}.jpg", quality=90
            )
    return root


def folder_loader(
    folder: Path, mean: Sequence[float], std: Sequence[float], batch: int, workers: int
) -> Iterator[Any]:
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([m / 255 for m in mean], [s / 255 for s in std]),
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
    return tempfile.mktemp(prefix="ddp-")  # all ranks open it


@contextmanager
def process_group(rank: int, size: int, store: str, backend: str) -> Iterator[None]:
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
    """Seconds of that many steps, after two that do not count."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # what replaces broadcast_buffers is not in CUDA 12's torch yet
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
    """Returns the number of images."""
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
    """Of a float32 buffer on the host; of one on a GPU with the copies there and back."""
    from mpi4py import MPI

    if device is not None:
        host.copy_(device)
    comm.Allreduce(MPI.IN_PLACE, host.numpy(), op=MPI.SUM)
    if device is not None:
        device.copy_(host)


def update_bn(batches: Sequence[Tensor], model: nn.Module) -> None:
    torch.optim.swa_utils.update_bn(batches, model)
