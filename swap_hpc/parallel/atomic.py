"""Files that are either whole or not there, even if several hosts write into one folder.

Imports neither torch nor MPI.
"""

import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from swap_hpc.errors import RunError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, flush it to the disk, then rename it.

    A reader finds the old file or the new one, never a part of it.

    Args:
        path: the file; missing parent folders are made.
        write: writes the content to the path that it is given.

    Raises:
        RunError: the file cannot be written (a full disk, a read-only folder); the old one stays.
    """
    # The name is this process's alone: several hosts may write the same file.
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        temporary.rename(path)
        # Some network file systems cannot flush a folder; the file is whole there all the same.
        with suppress(OSError):
            _flush(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole; bytes of a file name that are not UTF-8 are escaped.

    Raises:
        RunError: the file cannot be written.
    """
    content = text.encode(errors="backslashreplace")
    write_whole(path, lambda temporary: temporary.write_bytes(content))


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
