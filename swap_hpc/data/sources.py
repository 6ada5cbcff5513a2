"""The data sets that the package knows by name: images that are made, or files that are found."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from swap_hpc.data.dataset import Dataset, SplitName, with_statistics
from swap_hpc.data.encoded import Encoded
from swap_hpc.data.folders import (
    folder_files,
    notes_on_splits,
    split_folder_files,
    split_folders,
)
from swap_hpc.data.open_tars import allow_open_files
from swap_hpc.data.shards import CLASSES, find_shards, read_classes
from swap_hpc.data.splits import Arrays, Files
from swap_hpc.errors import UserError
from swap_hpc.recipe.inputs import Data

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}  # names here and in torchvision

# What a folder of the user's own data must hold, by the name of the data set.
LOCAL = {
    "folder": "train/<class>/ and test/<class>/ (or set data.test_every, which splits <class>/)",
    "webdataset": "train/*.tar and test/*.tar (swap-hpc pack makes them)",
}


def digits(data: Data) -> Dataset:
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


def cifar(data: Data) -> Dataset:
    """Load CIFAR-10 or CIFAR-100 (Krizhevsky, 2009) as torchvision stores it.

    A folder with image files in train/ and test/ will do, too.
    """
    if are_files(data):
        return folder(data)
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


def folder(data: Data) -> Dataset:
    """Find the images of `train/<class>/`, `val/<class>/` and `test/<class>/`.

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
    left_out = tuple(note for split in splits.values() for note in split.notes)
    return _of_files(splits, classes, notes + left_out)


def webdataset(data: Data) -> Dataset:
    """Find the shards of `train/`, `val/` and `test/`, as `swap-hpc pack` makes them."""
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
    return _of_files(splits, classes, notes)


def _of_files(
    splits: Mapping[SplitName, Encoded], classes: tuple[str, ...], notes: tuple[str, ...]
) -> Dataset:
    train, test, validation = splits["train"], splits["test"], splits.get("validation")
    return Dataset(train, test, classes, notes=notes, validation=validation)


def synthetic(data: Data) -> Dataset:
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


def are_files(data: Data) -> bool:
    """Tell whether a data set's source finds image files or shards; others make the images."""
    return data.name in LOCAL or (data.name in TORCHVISION and (data.path / "train").is_dir())


SOURCES: dict[str, Callable[[Data], Dataset]] = {
    "digits": digits,
    "cifar10": cifar,
    "cifar100": cifar,
    "folder": folder,
    "webdataset": webdataset,
    "synthetic": synthetic,
}
