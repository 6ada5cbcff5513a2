"""Tar files that stay open to the end of the process, and the limit on their number."""

import os
import resource
from functools import cache
from threading import Lock

from swap_hpc.errors import UserError

OTHER_FILES = 256  # descriptors left for all else: sockets, devices, logs, libraries

_opening = Lock()


def descriptor(name: str) -> int:
    """Return the descriptor of a tar file, which stays open; safe to call from several threads.

    Raises:
        OSError: the file cannot be opened.
    """
    # functools.cache may run a function twice, and so leak a descriptor, where two threads meet
    with _opening:
        return _open_once(name)


@cache
def _open_once(name: str) -> int:
    return os.open(name, os.O_RDONLY)


def allow_open_files(number: int) -> None:
    """Raise this process's limit, where it is too low, so that `number` more files can be open.

    Raises:
        UserError: the system's hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    already_open = len(os.listdir("/proc/self/fd"))
    wanted = already_open + number + OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"{number} shards stay open, but a process may open at most {hard} files: "
            "raise the limit (ulimit -Hn), or pack with a larger --samples-per-shard"
        )
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
