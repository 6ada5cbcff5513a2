"""Files that are either whole or not there, even if several hosts write into one folder.

Imports neither torch nor MPI.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from swap_hpc.errors import RunError

# What is asked before a file below a folder is changed: the folder, a function that may raise.
_guards: list[tuple[Path, Callable[[], object]]] = []


@contextmanager
def guarding(folder: Path, check: Callable[[], object]) -> Iterator[None]:
    """Call a function of this process before each change below a folder; it may refuse by raising.

    The owner of a run's folder thereby notices that it has lost the folder before it does harm.

    Args:
        folder: of the files.
        check: takes no argument; an exception prevents the change.
    """
    guard = (folder, check)
    _guards.append(guard)
    try:
        yield
    finally:
        _guards.remove(guard)


def ask_guards(path: Path) -> None:
    """Ask whether a file may be written, renamed or removed; an exception says that it may not."""
    for folder, check in _guards:
        if folder in path.parents:
            check()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, flush it to the disk, then rename it.

    A reader finds the old file or the new one, never a part of it.

    Args:
        path: the file; missing parent folders are made.
        write: writes the content to the path that it is given.

    Raises:
        RunError: the file cannot be written (a full disk, a read-only folder), or its folder is
            another job's by now; the old one stays.
    """
    # The name is this process's alone: several hosts may write the same file.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        ask_guards(path)
        temporary.rename(path)
        # Some network file systems cannot flush a folder; the file is whole there all the same.
        with suppress(OSError):
            _flush(path.parent)
    except OSError as error:
        ask_guards(path)  # another owner may have removed what was half written
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole; bytes of a file name that are not UTF-8 are escaped.

    Raises:
        RunError: the file cannot be written.
    """
    content = text.encode(errors="backslashreplace")
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def append_text(path: Path, text: str) -> None:
    """Append UTF-8 text to a file; missing parent folders are made.

    Raises:
        RunError: as `write_whole` does.
    """
    ask_guards(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        ask_guards(path)
        raise RunError(f"cannot write {path}: {error.strerror}") from None


def remove(path: Path) -> None:
    """Remove a file if it is there.

    Raises:
        RunError: its folder is another job's by now.
        OSError: it cannot be removed.
    """
    ask_guards(path)
    path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole.

    Raises:
        RunError: the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
