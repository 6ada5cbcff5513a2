"""Folders that are called like splits: which are read, and which are meant otherwise."""

import os
from pathlib import Path
from typing import Final

from swap_hpc.data.walk import entries, is_folder
from swap_hpc.errors import UserError

# What people call the folder of a split, in any case -> the name under which it is read.
NAMES: Final = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def unread_splits(path: Path) -> tuple[str, ...]:
    """Return a line for each folder beside `train` that is called like a split and is not read.

    Raises:
        UserError: its split has no folder of the name under which it would be read, or `path`
            cannot be read.
    """
    lines = []
    for name in _folders(path):
        wanted = NAMES.get(name.lower(), name)
        if wanted == name or _is_same(path / name, path / wanted):
            continue
        if not (path / wanted).is_dir():
            raise UserError(
                f"{path / name} is not read: call it {wanted}, or move it to another place"
            )
        lines.append(f"{path / name} is not read: {path / wanted} is the {wanted} split")
    return tuple(lines)


def check_unsplit(path: Path, classes: tuple[str, ...]) -> None:
    """Check that the folders of a folder that is to be split are classes, not splits.

    A class may be called `train`, as a vehicle is.

    Raises:
        UserError: several are called like splits, one holds folders like a split, or there is only
            one.
    """
    splits = [name for name in classes if name.lower() in NAMES]
    if len(splits) > 1:
        raise UserError(
            f"{path} has {' and '.join(splits)}, so it is split already: leave data.test_every "
            "out, and call its folders train, val and test"
        )
    if splits and (len(classes) == 1 or _folders(path / splits[0])):
        raise UserError(
            f"{path / splits[0]} looks like a split, not like a class: "
            f"point --data at {path / splits[0]}, or leave data.test_every out"
        )
    if len(classes) == 1:
        raise UserError(
            f"{path} holds a single folder, {classes[0]}: data.test_every needs one for each class"
        )


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in entries(path) if is_folder(entry))


def _is_same(path: Path, other: Path) -> bool:
    """Tell whether both are one folder: a file system may ignore case, and there may be links."""
    return other.is_dir() and os.path.samefile(path, other)
