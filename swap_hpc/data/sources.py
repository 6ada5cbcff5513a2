"""The data sets that the package knows by name, and how each is loaded."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from swap_hpc.data.dataset import Dataset, SplitName, with_statistics
from swap_hpc.data.decode import decode, image_shapes
from swap_hpc.data.encoded import Encoded
from swap_hpc.data.folders import (
    folder_files,
    notes_on_splits,
    split_folder_files,
    split_folders,
)
from swap_hpc.data.normalisation import IMAGENET_MEAN, IMAGENET_STD
from swap_hpc.data.open_tars import allow_open_files
from swap_hpc.data.pieces import pixels_within
from swap_hpc.data.shards import CLASSES, find_shards, read_classes
from swap_hpc.data.splits import Arrays, Files
from swap_hpc.errors import UserError
from swap_hpc.recipe.inputs import Data

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}  # names here and in torchvision


def digits(data: Data, threads: int) -> Dataset:
    """Load scikit-learn's digits: 1,797 images of 8x8, one channel; every third one is for testing.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
    Repository, 1998.
    """
    # the file itself: importing scikit-learn for it would take each rank a second
    found = importlib.util.find_spec("sklearn")
    assert found is not None and found.submodule_search_locations, "a dependency"
    package = Path(found.submodule_search_locations[0])
    file = package / "datasets" / "data" / "digits.csv.gz"
    table = np.loadtxt(file, delimiter=",", dtype=np.int64)
    pixels, labels = table[:, :64], table[:, 64].copy()
    images = (pixels.reshape(-1, 8, 8, 1) * 15).astype(np.uint8)  # 0 to 16 becomes 0 to 240
    test = np.arange(len(images)) % 3 == 0
    return with_statistics(
        Arrays(images[~test], labels[~test]),
        Arrays(images[test], labels[test]),
        tuple("0123456789"),
    )


def cifar(data: Data, threads: int) -> Dataset:
    """Load CIFAR-10 or CIFAR-100 (Krizhevsky, 2009) as torchvision stores it.

    A folder with image files in train/ and test/ will do, too.
    """
    if (data.path / "train").is_dir():
        return folder(data, threads)
    train = _torchvision(data.name, data.path, train=True)
    test = _torchvision(data.name, data.path, train=False)
    return with_statistics(
        Arrays(train.data, np.array(train.targets, dtype=np.int64)),
        Arrays(test.data, np.array(test.targets, dtype=np.int64)),
        tuple(train.classes),
    )


def torchvision_download(name: str, path: Path) -> None:
    """Download one of torchvision's data sets into a folder, unless it is there, and verify it.

    Raises:
        UserError: the download fails.
    """
    try:
        # torchvision prints its progress, which does not belong in a job's output
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            _torchvision(name, path, train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{name} is not in {path} and could not be downloaded ({error}): "
            f"where there is a network, run swap-hpc data {name} --data DIR, then use --data DIR"
        ) from None


def _torchvision(name: str, path: Path, **arguments: bool):  # type: ignore[no-untyped-def]
    import torchvision

    return getattr(torchvision.datasets, TORCHVISION[name])(str(path), **arguments)


def folder(data: Data, threads: int) -> Dataset:
    """Load the images of `train/<class>/`, `val/<class>/` and `test/<class>/`.

    Where the recipe sets `test_every`, it splits those of `<class>/`.
    """
    splits: dict[SplitName, Files]
    notes: tuple[str, ...] = ()
    if data.test_every:
        train, test, classes = split_folder_files(data.path, data.test_every)
        splits = {"train": train, "test": test}
    else:
        notes = notes_on_splits(data.path)
        splits, classes = folder_files(data.path)
    dataset = _from_images(data, splits, classes, threads)
    left_out = tuple(note for split in splits.values() for note in split.notes)
    return replace(dataset, notes=notes + left_out)


def webdataset(data: Data, threads: int) -> Dataset:
    """Load the shards of `train/`, `val/` and `test/`, as `swap-hpc pack` makes them."""
    notes = notes_on_splits(data.path)
    splits = {name: find_shards(folder) for name, folder in split_folders(data.path).items()}
    allow_open_files(sum(len(split.tars) for split in splits.values()))
    names = data.path / CLASSES
    number = 1 + int(max(split.labels.max() for split in splits.values()))
    classes = read_classes(names) if names.is_file() else tuple(map(str, range(number)))
    if number > len(classes):
        raise UserError(
            f"{data.path}: there is a class {number - 1}, but {names} names {len(classes)}, "
            "counted from 0: add the missing names"
        )
    dataset = _from_images(data, splits, classes, threads)
    return replace(dataset, notes=notes)


def _from_images(
    data: Data, splits: Mapping[SplitName, Encoded], classes: tuple[str, ...], threads: int
) -> Dataset:
    """Decode encoded images into memory if they fit in `data.memory_gib`.

    Otherwise, or if the recipe sets several sizes, they are read in every epoch.

    Raises:
        UserError: an image cannot be decoded, or the recipe must set a size.
    """
    side = data.last_size
    size = (side, side) if side else None
    pixels = pixels_within(data.memory_gib)
    height, width = size or _common_size(splits["train"].take(np.arange(1)), threads)
    several_sizes = len(data.image_size or ()) > 1
    bytes_in_memory = sum(map(len, splits.values())) * height * width * 3
    if bytes_in_memory <= data.memory_gib * 2**30 and not several_sizes:
        if size is None:
            for split in splits.values():
                _common_size(split, threads, (height, width))
        decoded = {name: _decoded(each, size, threads, pixels) for name, each in splits.items()}
        return with_statistics(
            decoded["train"], decoded["test"], classes, decoded.get("validation")
        )
    if size is None:
        raise UserError(
            f"{data.path} is larger than data.memory_gib = {data.memory_gib}: "
            "set data.image_size (pixels) to read it in every epoch, or allow more memory"
        )
    # a pass over all images for their own statistics would take as long as an epoch
    return Dataset(
        splits["train"],
        splits["test"],
        classes,
        size,
        3,
        IMAGENET_MEAN,
        IMAGENET_STD,
        pixels_at_once=pixels,
        validation=splits.get("validation"),
    )


def _decoded(split: Encoded, size: tuple[int, int] | None, threads: int, pixels: int) -> Arrays:
    names = tuple(map(split.name, range(len(split))))
    images = decode(split, size, threads, pixels)
    return Arrays(images, split.labels, "".join(split.contents), names)


def _common_size(
    split: Encoded, threads: int, expected: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Return the (height, width) that all images have.

    Args:
        split: the images.
        threads: CPU threads.
        expected: the size that they must have; None: that of the first one.

    Raises:
        UserError: an image cannot be read, or has another size.
    """
    sizes = image_shapes(split, threads)[:, :2]
    height, width = expected or (int(sizes[0][0]), int(sizes[0][1]))
    others = np.flatnonzero((sizes != (height, width)).any(axis=1))
    if len(others):
        other = others[0]
        found = f"{split.name(other)} is {sizes[other][1]}x{sizes[other][0]}"
        raise UserError(
            f"the images differ in size (the first one is {width}x{height}, {found}): "
            "set data.image_size (pixels)"
        )
    return height, width


def synthetic(data: Data, threads: int) -> Dataset:
    """Make noise around one random pattern per class: something to learn without data, any size."""
    size = data.last_size or 32
    generator = np.random.Generator(np.random.Philox(0))
    patterns = generator.normal(0, 20, (data.classes, size, size, 3))

    def split(samples: int) -> Arrays:
        labels = np.arange(samples, dtype=np.int64) % data.classes
        noise = generator.normal(128, 40, (samples, size, size, 3))
        images = (noise + patterns[labels]).clip(0, 255).astype(np.uint8)
        return Arrays(images, labels)

    # the training split first: both draw from one generator
    train = split(data.samples)
    test = split(max(1, data.samples // 4))
    return with_statistics(train, test, tuple(map(str, range(data.classes))))


SOURCES: dict[str, Callable[[Data, int], Dataset]] = {
    "digits": digits,
    "cifar10": cifar,
    "cifar100": cifar,
    "folder": folder,
    "webdataset": webdataset,
    "synthetic": synthetic,
}
