"""The image files of a folder with one folder per class, and their labels."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from swap_hpc.data.dataset import SplitName
from swap_hpc.data.split_names import check_unsplit, unread_splits
from swap_hpc.data.splits import Files
from swap_hpc.data.walk import LeftOut, entries, folder_id, is_folder, note_special, walk
from swap_hpc.errors import UserError


def folder_files(path: Path) -> tuple[dict[SplitName, Files], tuple[str, ...]]:
    """Find the images in `train/<class>/`, `val/<class>/` and `test/<class>/`, and below.

    Returns:
        The splits' files, and the classes' names.

    Raises:
        UserError: a folder is missing, empty or unreadable, or the splits' classes differ.
    """
    train, *others = folders = split_folders(path)
    classes = _classes(folders[train])
    for name in others:
        _check_classes(path, folders[name], classes)
    return {name: _files(folder, classes) for name, folder in folders.items()}, classes


def _check_classes(path: Path, folder: Path, classes: tuple[str, ...]) -> None:
    found = _classes(folder)
    if found != classes:
        differ = sorted(set(classes) ^ set(found))
        raise UserError(
            f"{path}: train and {folder.name} have different classes ({', '.join(differ[:5])}): "
            "give both the same folders"
        )


def split_folder_files(path: Path, every: int) -> tuple[Files, Files, tuple[str, ...]]:
    """Find the images in `<class>/` and below, and hold out some of them as the test split.

    The test split gets the first image of each class, sorted by path, and every `every`-th after
    it.

    Returns:
        Training files, test files and the classes' names.

    Raises:
        UserError: the folder is missing, empty, unreadable or split already, it has only one
            class, or a class has only one image.
    """
    classes = _classes(path, "<class>/")
    check_unsplit(path, classes)
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


def split_folders(path: Path) -> dict[SplitName, Path]:
    """Return the folders of the splits: `train`, `val` where it exists, and `test`.

    Where there is no `test`, `val` is the test split, as in ImageNet.
    """
    train, val, test = (path / name for name in ("train", "val", "test"))
    if not val.is_dir():
        return {"train": train, "test": test}
    if not test.is_dir():
        return {"train": train, "test": val}
    return {"train": train, "validation": val, "test": test}


def notes_on_splits(path: Path) -> tuple[str, ...]:
    """Return lines on folders that are not read, and where `val` is the test split.

    Raises:
        UserError: a folder is called like a split, which has no folder of the right name.
    """
    unread = unread_splits(path)
    test = split_folders(path)["test"]
    if test.name == "test":
        return unread
    return (
        *unread,
        f"{test} is the test split, and there is no validation split: no {path / 'test'}",
    )


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
