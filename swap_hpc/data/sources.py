"""Where each data set comes from."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from swap_hpc.data.decode import decode, image_shapes
from swap_hpc.data.splits import Arrays, Dataset, Files, with_statistics
from swap_hpc.errors import UserError
from swap_hpc.recipe import Data

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}

# Per channel, of pixels in [0, 255]: what torchvision's ImageNet models are normalised by.
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def digits(data: Data, threads: int) -> Dataset:
    """scikit-learn's embedded digits: 1,797 images of 8x8, one channel; every third is a test image.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images[..., None] * 15).astype(np.uint8)  # 0..16 -> 0..240
    test = np.arange(len(images)) % 3 == 0
    labels = bunch.target.astype(np.int64)
    return with_statistics(Arrays(images[~test], labels[~test]), Arrays(images[test], labels[test]), tuple("0123456789"))


def cifar(data: Data, threads: int) -> Dataset:
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009) as torchvision stores it; or a folder with train/ and test/ of image files."""
    if (data.path / "train").is_dir():
        return folder(data, threads)
    train, test = (_torchvision(data.name, data.path, train=train) for train in (True, False))
    in_memory = [Arrays(split.data, np.array(split.targets, dtype=np.int64)) for split in (train, test)]
    return with_statistics(in_memory[0], in_memory[1], tuple(train.classes))


def torchvision_download(name: str, path: Path) -> None:
    try:
        # torchvision prints what it does; a job's output is not the place
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            _torchvision(name, path, train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {path} and could not be downloaded ({error}): "
            f"where there is a network run swap-hpc data {name} --data DIR, then use --data DIR"
        ) from None


def _torchvision(name: str, path: Path, **arguments: bool):  # type: ignore[no-untyped-def]
    import torchvision

    return getattr(torchvision.datasets, TORCHVISION[name])(str(path), **arguments)


def folder(data: Data, threads: int) -> Dataset:
    """`train/<class>/*` and `test/<class>/*`: decoded into memory where that fits `data.memory_gib`, else read in every epoch."""
    classes = _classes(data.path / "train")
    if (others := _classes(data.path / "test")) != classes:
        differ = sorted(set(classes) ^ set(others))
        raise UserError(f"{data.path}: train and test have different classes ({', '.join(differ[:5])}): give both the same folders")
    train, test = (_files(data.path / split, classes) for split in ("train", "test"))
    size = (data.image_size, data.image_size) if data.image_size else None
    height, width = size or _own_size(train.paths[:1], threads)
    if (len(train) + len(test)) * height * width * 3 <= data.memory_gib * 2**30:
        if size is None:
            _own_size(train.paths + test.paths, threads)
        in_memory = [Arrays(decode(split.paths, size, threads), split.labels) for split in (train, test)]
        return with_statistics(in_memory[0], in_memory[1], classes)
    if size is None:
        raise UserError(
            f"{data.path} is larger than data.memory_gib = {data.memory_gib}: "
            "set data.image_size (pixels) to read it in every epoch, or allow more memory"
        )
    return Dataset(train, test, classes, size, 3, IMAGENET_MEAN, IMAGENET_STD)


def _classes(split: Path) -> tuple[str, ...]:
    if not split.is_dir():
        raise UserError(f"no folder {split}: point --data at a folder with train/<class>/ and test/<class>/")
    classes = tuple(sorted(entry.name for entry in os.scandir(split) if entry.is_dir() and not entry.name.startswith(".")))
    if not classes:
        raise UserError(f"{split} is empty: it needs one folder of images per class")
    return classes


def _files(split: Path, classes: tuple[str, ...]) -> Files:
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(e.path for e in os.scandir(split / name) if e.is_file() and not e.name.startswith("."))
        if not found:
            raise UserError(f"{split / name} is empty: put the class's images there, or remove the folder from train and test")
        paths += found
        labels += [label] * len(found)
    return Files(tuple(paths), np.array(labels, dtype=np.int64))


def _own_size(paths: tuple[str, ...], threads: int) -> tuple[int, int]:
    """(height, width) of image files that are all of one size."""
    shapes = image_shapes(paths, threads)[:, :2]
    odd = np.flatnonzero((shapes != shapes[0]).any(axis=1))
    if len(odd):
        sizes = [f"{paths[i]} is {shapes[i][1]}x{shapes[i][0]}" for i in (0, odd[0])]
        raise UserError(f"the images differ in size ({', '.join(sizes)}): set data.image_size (pixels)")
    return int(shapes[0][0]), int(shapes[0][1])


def synthetic(data: Data, threads: int) -> Dataset:
    """Noise around one random pattern per class: something to learn, of any size, for trials without data."""
    size = data.image_size or 32
    generator = np.random.Generator(np.random.Philox(0))
    patterns = generator.normal(0, 20, (data.classes, size, size, 3))

    def split(samples: int) -> Arrays:
        labels = np.arange(samples, dtype=np.int64) % data.classes
        noise = generator.normal(128, 40, (samples, size, size, 3))
        return Arrays((noise + patterns[labels]).clip(0, 255).astype(np.uint8), labels)

    return with_statistics(split(data.samples), split(max(1, data.samples // 4)), tuple(str(c) for c in range(data.classes)))


SOURCES: dict[str, Callable[[Data, int], Dataset]] = {
    "digits": digits,
    "cifar10": cifar,
    "cifar100": cifar,
    "folder": folder,
    "synthetic": synthetic,
}
