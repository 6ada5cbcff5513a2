"""The files below a folder, and what else lies there and is left out."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from swap_hpc.errors import UserError

Identity = tuple[int, int]  # of a folder: its device and inode, whatever links lead to it

# Why an entry is left out: of one, of several
BROKEN = ("broken link", "broken links")
LOOP = ("link back to a folder above it", "links back to a folder above them")
SPECIAL = ("is no regular file", "are no regular files")


@dataclass
class LeftOut:
    """Entries that are neither files nor folders to walk."""

    paths: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # by why

    def add(self, why: tuple[str, str], path: str) -> None:
        self.paths.setdefault(why, []).append(path)

    def __len__(self) -> int:
        return sum(map(len, self.paths.values()))

    def __str__(self) -> str:
        """How many, and why, for example "2 broken links (first: a/b.jpg), 1 is no regular file (a/pipe)"."""
        return ", ".join(
            f"{len(paths)} {why[len(paths) > 1]} ({'first: ' if len(paths) > 1 else ''}{min(paths)})"
            for why, paths in self.paths.items()
        )


def walk(folder: Path, left_out: LeftOut, above: tuple[Identity, ...] = ()) -> Iterator[str]:
    """Paths of the files in a folder and in the folders below it, links followed, in no order; hidden ones are passed over.

    `above`: the folders that lead here, which no link may lead back to. Raises UserError for a folder that cannot be read.
    """
    above = (*above, identity(folder))
    for entry in entries(folder):
        if is_file(entry):
            yield entry.path
        elif not is_folder(entry):
            left_out.add(_why(entry), entry.path)
        elif identity(Path(entry.path)) in above:
            left_out.add(LOOP, entry.path)
        else:
            yield from walk(Path(entry.path), left_out, above)


def note_special(folder: Path, left_out: LeftOut) -> None:
    """Adds what lies in a folder itself and is neither a file nor a folder."""
    for entry in entries(folder):
        if not is_file(entry) and not is_folder(entry):
            left_out.add(_why(entry), entry.path)


def entries(folder: Path) -> list["os.DirEntry[str]"]:
    """What a folder holds, but for hidden names. Raises UserError."""
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None


def identity(folder: Path) -> Identity:
    try:
        found = folder.stat()
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None
    return found.st_dev, found.st_ino


def is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself, or to where one may not look
        return False


def is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _why(entry: "os.DirEntry[str]") -> tuple[str, str]:
    return BROKEN if entry.is_symlink() and not os.path.exists(entry.path) else SPECIAL
