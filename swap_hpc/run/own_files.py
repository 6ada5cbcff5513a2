"""The names of the files that runs leave in subfolders, and their removal by name.

A folder may hold files of its user, too: these stay, and so does a folder that holds one.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from swap_hpc.parallel.atomic import remove

_PARTS = ("large_batch", "group-[0-9][0-9][0-9]*")
_JOURNALS = ("world", "group-[0-9][0-9][0-9]*")

# Subfolder of a run -> patterns of its files' names.
CHECKPOINTS = (
    *(f"{part}-*.{kind}" for part in _PARTS for kind in ("safetensors", "damaged")),
    "averages.json",
    "rank-[0-9]*.alive",
    "rank-[0-9]*.part",
)
METRICS = tuple(f"{name}.jsonl" for name in _JOURNALS)
EVENTS = ("events*",)  # of TensorBoard, in a folder for each curve
NOTES = tuple(f"{name}.json" for name in (*_JOURNALS, "average"))  # of a tracker


def own_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files in a folder whose names match, with those half written; sorted."""
    half_written = [f".{pattern}.*.[0-9]*" for pattern in patterns]
    found = {file for pattern in (*patterns, *half_written) for file in folder.glob(pattern)}
    return sorted(found)


def remove_files(files: Iterable[Path]) -> None:
    """Remove files as far as possible, and the folders that this leaves empty.

    Raises:
        RunError: a file's folder is another job's by now.
    """
    files = list(files)
    for file in files:
        with suppress(OSError):
            remove(file)
    for folder in {file.parent for file in files}:
        remove_if_empty(folder)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that is empty; any other stays."""
    with suppress(OSError):
        folder.rmdir()


def start_files(out: Path) -> list[Path]:
    """Return what a start of a run that saved nothing leaves in subfolders of the run's folder."""
    names = (*_JOURNALS, "average")
    boards = [board for name in names for board in (out / "tensorboard").glob(name)]
    return [
        *own_files(out / "checkpoints", CHECKPOINTS),
        *own_files(out / "metrics", METRICS),
        *own_files(out / "tracking", NOTES),
        *(file for board in boards for file in own_files(board, EVENTS)),
    ]
