"""Where each data set comes from."""

import contextlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from swap_hpc.data.decode import decode, image_shapes
from swap_hpc.data.encoded import Encoded
from swap_hpc.data.pieces import pixels_within
from swap_hpc.data.shards import CLASSES, allow_open_files, find_shards, read_classes
from swap_hpc.data.splits import Arrays, Dataset, Files, with_statistics
from swap_hpc.data.walk import LeftOut, entries, identity, is_folder, note_special, walk
from swap_hpc.errors import UserError
from swap_hpc.recipe.schema import Data

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}

# Per channel, of pixels in [0, 255]: what torchvision's ImageNet models are normalised by.
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def digits(data: Data, threads: int) -> Dataset:
    """scikit-learn's embedded digits: 1,797 images of 8x8, one channel; every third is a test image.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """
    # the file itself: importing scikit-learn for it would take each rank a second
    found = importlib.util.find_spec("sklearn")
    assert found is not None and found.submodule_search_locations, "a dependency"
    table = np.loadtxt(
        Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz",
        delimiter=",",
        dtype=np.int64,
    )
    images, labels = (
        (table[:, :64].reshape(-1, 8, 8, 1) * 15).astype(np.uint8),
        table[:, 64].copy(),
    )  # 0..16 -> 0..240
    test = np.arange(len(images)) % 3 == 0
    return with_statistics(
        Arrays(images[~test], labels[~test]),
        Arrays(images[test], labels[test]),
        tuple("0123456789"),
    )


def cifar(data: Data, threads: int) -> Dataset:
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009) as torchvision stores it; or a folder with train/ and test/ of image files."""
    if (data.path / "train").is_dir():
        return folder(data, threads)
    train, test = (_torchvision(data.name, data.path, train=train) for train in (True, False))
    in_memory = [
        Arrays(split.data, np.array(split.targets, dtype=np.int64)) for split in (train, test)
    ]
    return with_statistics(in_memory[0], in_memory[1], tuple(train.classes))


def torchvision_download(name: str, path: Path) -> None:
    try:
        # torchvision prints what it does; a job's output is not the place
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
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
    """`train/<class>/**` and `test/<class>/**`: decoded into memory where that fits `data.memory_gib`, else read in every epoch."""
    train, test, classes = (
        _split_files(data.path, data.test_every) if data.test_every else folder_files(data.path)
    )
    return replace(_encoded(data, train, test, classes, threads), notes=train.notes + test.notes)


def folder_files(path: Path) -> tuple[Files, Files, tuple[str, ...]]:
    """Training and test files, and the classes, of a folder with one folder per class in each split. Raises UserError."""
    held_out = _test_split(path)
    classes = _classes(path / "train")
    if (others := _classes(held_out)) != classes:
        differ = sorted(set(classes) ^ set(others))
        raise UserError(
            f"{path}: train and {held_out.name} have different classes ({', '.join(differ[:5])}): give both the same folders"
        )
    return _files(path / "train", classes), _files(held_out, classes), classes


def _split_files(path: Path, every: int) -> tuple[Files, Files, tuple[str, ...]]:
    """The same of a folder with one folder per class: of each class the first image tests, and every `every`-th after it."""
    if (path / "train").is_dir() and _test_split(path).is_dir():
        raise UserError(
            f"{path} has train and test, so it is split already: leave data.test_every out"
        )
    classes = _classes(path, "<class>/")
    files = _files(path, classes)
    counts = np.bincount(files.labels)
    if counts.min() == 1:
        raise UserError(
            f"{path / classes[int(counts.argmin())]} holds one image: it needs two, to train and to test on"
        )
    test = np.concatenate([np.arange(count) for count in counts]) % every == 0
    return (
        replace(files.take(np.flatnonzero(~test)), notes=files.notes),
        files.take(np.flatnonzero(test)),
        classes,
    )


def _test_split(path: Path) -> Path:
    """`test`, or `val` as ImageNet has it."""
    return (
        path / "val" if (path / "val").is_dir() and not (path / "test").is_dir() else path / "test"
    )


def webdataset(data: Data, threads: int) -> Dataset:
    """`train/*.tar` and `test/*.tar`, WebDataset shards of images and labels, as `swap-hpc pack` makes them."""
    train, test = find_shards(data.path / "train"), find_shards(_test_split(data.path))
    allow_open_files(len(train.tars) + len(test.tars))
    names = data.path / CLASSES
    number = 1 + int(max(train.labels.max(), test.labels.max()))
    classes = read_classes(names) if names.is_file() else tuple(map(str, range(number)))
    if number > len(classes):
        raise UserError(
            f"{data.path}: there is a class {number - 1}, but {names} names {len(classes)}, which are 0 to {len(classes) - 1}"
        )
    return _encoded(data, train, test, classes, threads)


def _encoded(
    data: Data, train: Encoded, test: Encoded, classes: tuple[str, ...], threads: int
) -> Dataset:
    side, several, pixels = (
        data.last_size,
        len(data.image_size or ()) > 1,
        pixels_within(data.memory_gib),
    )
    size = (side, side) if side else None
    height, width = size or _own_size(train.take(np.arange(1)), threads)
    if (len(train) + len(test)) * height * width * 3 <= data.memory_gib * 2**30 and not several:
        if size is None:
            for split in (train, test):
                _own_size(split, threads, (height, width))
        in_memory = [
            Arrays(decode(split, size, threads, pixels), split.labels, "".join(split.contents))
            for split in (train, test)
        ]
        return with_statistics(in_memory[0], in_memory[1], classes)
    if size is None:
        raise UserError(
            f"{data.path} is larger than data.memory_gib = {data.memory_gib}: "
            "set data.image_size (pixels) to read it in every epoch, or allow more memory"
        )
    return Dataset(
        train, test, classes, size, 3, IMAGENET_MEAN, IMAGENET_STD, pixels_at_once=pixels
    )


def _classes(split: Path, wanted: str = "train/<class>/ and test/<class>/") -> tuple[str, ...]:
    if not split.is_dir():
        raise UserError(f"no folder {split}: point --data at a folder with {wanted}")
    classes = tuple(sorted(entry.name for entry in entries(split) if is_folder(entry)))
    if not classes:
        raise UserError(f"{split} is empty: it needs one folder of images per class")
    return classes


def _files(split: Path, classes: tuple[str, ...]) -> Files:
    """The files of all classes, class by class, each class's sorted by path. Raises UserError."""
    paths: list[str] = []
    labels: list[int] = []
    left_out, above = LeftOut(), tuple(map(identity, (split, *split.resolve().parents)))
    note_special(split, left_out)
    for label, name in enumerate(classes):
        before = len(left_out)
        found = sorted(walk(split / name, left_out, above))
        if not found:
            why = f" (left out: {left_out})" if len(left_out) > before else ""
            raise UserError(
                f"{split / name} is empty{why}: put the class's images there, or remove the folder from train and test"
            )
        paths += found
        labels += [label] * len(found)
    return Files(tuple(paths), np.array(labels, dtype=np.int64), _notes(split, left_out))


def _notes(split: Path, left_out: LeftOut) -> tuple[str, ...]:
    if not len(left_out):
        return ()
    number = "1 entry" if len(left_out) == 1 else f"{len(left_out)} entries"
    return (f"{number} in {split} {'is' if len(left_out) == 1 else 'are'} left out: {left_out}",)


def _own_size(
    split: Encoded, threads: int, expected: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(height, width) of images that are all of one size, the `expected` one where given. Raises UserError."""
    shapes = image_shapes(split, threads)[:, :2]
    height, width = expected or (int(shapes[0][0]), int(shapes[0][1]))
    odd = np.flatnonzero((shapes != (height, width)).any(axis=1))
    if len(odd):
        found = f"{split.name(odd[0])} is {shapes[odd[0]][1]}x{shapes[odd[0]][0]}"
        raise UserError(
            f"the images differ in size (the first one is {width}x{height}, {found}): set data.image_size (pixels)"
        )
    return height, width


def synthetic(data: Data, threads: int) -> Dataset:
    """Noise around one random pattern per class: something to learn, of any size, for trials without data."""
    size = data.last_size or 32
    generator = np.random.Generator(np.random.Philox(0))
    patterns = generator.normal(0, 20, (data.classes, size, size, 3))

    def split(samples: int) -> Arrays:
        labels = np.arange(samples, dtype=np.int64) % data.classes
        noise = generator.normal(128, 40, (samples, size, size, 3))
        return Arrays((noise + patterns[labels]).clip(0, 255).astype(np.uint8), labels)

    return with_statistics(
        split(data.samples),
        split(max(1, data.samples // 4)),
        tuple(str(c) for c in range(data.classes)),
    )


SOURCES: dict[str, Callable[[Data, int], Dataset]] = {
    "digits": digits,
    "cifar10": cifar,
    "cifar100": cifar,
    "folder": folder,
    "webdataset": webdataset,
    "synthetic": synthetic,
}
