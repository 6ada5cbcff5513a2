"""The image files of a folder with one folder per class, and their labels."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from swap_hpc.data.splits import Files
from swap_hpc.data.walk import LeftOut, entries, folder_id, is_folder, note_special, walk
from swap_hpc.errors import UserError


def folder_files(path: Path) -> tuple[Files, Files, tuple[str, ...]]:
    """Find the images in `train/<class>/` and `test/<class>/`, and in all folders below.

    Returns:
        Training files, test files and the classes' names.

    Raises:
        UserError: a folder is missing, empty or unreadable, or the splits' classes differ.
    """
    test = folder_of_test_split(path)
    classes = _classes(path / "train")
    test_classes = _classes(test)
    if test_classes != classes:
        differ = sorted(set(classes) ^ set(test_classes))
        raise UserError(
            f"{path}: train and {test.name} have different classes ({', '.join(differ[:5])}): "
            "give both the same folders"
        )
    return _files(path / "train", classes), _files(test, classes), classes


def split_folder_files(path: Path, every: int) -> tuple[Files, Files, tuple[str, ...]]:
    """Find the images in `<class>/` and below, and hold out some of them as the test split.

    The test split gets the first image of each class, sorted by path, and every `every`-th after
    it.

    Returns:
        Training files, test files and the classes' names.

    Raises:
        UserError: the folder is missing, empty, unreadable or split already, or a class has only
            one image.
    """
    if (path / "train").is_dir() and folder_of_test_split(path).is_dir():
        raise UserError(
            f"{path} has train and test, so it is split already: leave data.test_every out"
        )
    classes = _classes(path, "<class>/")
    files = _files(path, classes)
    counts = np.bincount(files.labels)
    if counts.min() == 1:
        name = classes[int(counts.argmin())]
        raise UserError(
            f"{path / name} holds one image: it needs two, one to train and one to test on"
        )
    place_in_class = np.concatenate([np.arange(count) for count in counts])
    is_test = place_in_class % every == 0
    train = replace(files.take(np.flatnonzero(~is_test)), notes=files.notes)
    return train, files.take(np.flatnonzero(is_test)), classes


def folder_of_test_split(path: Path) -> Path:
    """Return the folder `test`, or `val`, as in ImageNet, if only that exists."""
    test, val = path / "test", path / "val"
    return val if val.is_dir() and not test.is_dir() else test


def _classes(split: Path, wanted: str = "train/<class>/ and test/<class>/") -> tuple[str, ...]:
    if not split.is_dir():
        raise UserError(f"no folder {split}: point --data at a folder with {wanted}")
    classes = tuple(sorted(entry.name for entry in entries(split) if is_folder(entry)))
    if not classes:
        raise UserError(f"{split} is empty: it needs one folder of images per class")
    return classes


def _files(split: Path, classes: tuple[str, ...]) -> Files:
    """Find the files of all classes, class by class, those of a class sorted by path.

    Raises:
        UserError: a class has no file, or a folder cannot be read.
    """
    paths: list[str] = []
    labels: list[int] = []
    left_out = LeftOut()
    above = tuple(map(folder_id, (split, *split.resolve().parents)))
    note_special(split, left_out)
    for label, name in enumerate(classes):
        before = len(left_out)
        found = sorted(walk(split / name, left_out, above))
        if not found:
            why = f" (left out: {left_out})" if len(left_out) > before else ""
            raise UserError(
                f"{split / name} is empty{why}: put the class's images there, "
                "or remove the folder from train and test"
            )
        paths += found
        labels += [label] * len(found)
    return Files(tuple(paths), np.array(labels, dtype=np.int64), _notes(split, left_out))


def _notes(split: Path, left_out: LeftOut) -> tuple[str, ...]:
    number = len(left_out)
    if not number:
        return ()
    entries_are = "1 entry in {} is" if number == 1 else f"{number} entries in {{}} are"
    return (f"{entries_are.format(split)} left out: {left_out}",)
