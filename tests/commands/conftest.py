"""Fixtures that several files of this folder use."""

from collections.abc import Iterator
from pathlib import Path

import disks
import pytest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of 1 MiB."""
    try:
        with disks.small_disk(tmp_path / "disk", "1m") as disk:
            yield disk
    except disks.CannotMount as why:
        pytest.skip(f"cannot mount a file system here: {why}")
