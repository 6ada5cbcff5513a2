"""Small file systems, which fill up."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class CannotMount(Exception):
    """No file system can be mounted here; the message says why."""


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Make a folder that is a file system of its own.

    Args:
        folder: does not exist yet.
        size: of the file system, as "1m".

    Raises:
        CannotMount: this needs root.
    """
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(line, capture_output=True, text=True, check=False)
    if mounted.returncode:
        raise CannotMount(mounted.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
