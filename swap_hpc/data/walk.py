"""The files below a folder, and the entries that are left out."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from swap_hpc.errors import UserError

FolderId = tuple[int, int]  # device and inode of a folder: the same for every link that leads to it
Reason = tuple[str, str]  # why entries are left out: the words for one entry, and for several

BROKEN: Reason = ("broken link", "broken links")
LOOP: Reason = ("link back to a folder above it", "links back to a folder above them")
SPECIAL: Reason = ("special file", "special files")  # a pipe, a socket, a device


@dataclass
class LeftOut:
    """Entries that are neither files nor folders to walk."""

    paths: dict[Reason, list[str]] = field(default_factory=dict)

    def add(self, reason: Reason, path: str) -> None:
        self.paths.setdefault(reason, []).append(path)

    def __len__(self) -> int:
        return sum(map(len, self.paths.values()))

    def __str__(self) -> str:
        """Counts and reasons: "2 broken links (first: a/b.jpg), 1 special file (a/pipe)"."""
        return ", ".join(_counted(reason, paths) for reason, paths in self.paths.items())


def _counted(reason: Reason, paths: list[str]) -> str:
    one, several = reason
    if len(paths) == 1:
        return f"1 {one} ({paths[0]})"
    return f"{len(paths)} {several} (first: {min(paths)})"


def walk(folder: Path, left_out: LeftOut, above: tuple[FolderId, ...] = ()) -> Iterator[str]:
    """Yield the paths of the files in a folder and below it, in no particular order.

    Links are followed. Names that begin with a dot are ignored.

    Args:
        folder: where to begin.
        left_out: collects the entries that are neither files nor folders to walk.
        above: the folders that lead to this one. A link back to one of them would never end.

    Raises:
        UserError: a folder cannot be read.
    """
    above = (*above, folder_id(folder))
    for entry in entries(folder):
        if is_file(entry):
            yield entry.path
        elif not is_folder(entry):
            left_out.add(_reason(entry), entry.path)
        elif folder_id(Path(entry.path)) in above:
            left_out.add(LOOP, entry.path)
        else:
            yield from walk(Path(entry.path), left_out, above)


def note_special(folder: Path, left_out: LeftOut) -> None:
    """Collect the entries of one folder, not of those below it, that are neither file nor folder.

    Raises:
        UserError: the folder cannot be read.
    """
    for entry in entries(folder):
        if not is_file(entry) and not is_folder(entry):
            left_out.add(_reason(entry), entry.path)


def entries(folder: Path) -> list["os.DirEntry[str]"]:
    """Return the entries of a folder, without names that begin with a dot.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None


def folder_id(folder: Path) -> FolderId:
    try:
        found = folder.stat()
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None
    return found.st_dev, found.st_ino


def is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself, or into a folder without permission
        return False


def is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # as in `is_file`
        return False


def _reason(entry: "os.DirEntry[str]") -> Reason:
    broken = entry.is_symlink() and not os.path.exists(entry.path)
    return BROKEN if broken else SPECIAL
