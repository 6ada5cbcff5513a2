"""The lock on a run's folder: a second job that is started into it ends at once.

Otherwise both would write the same files.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from swap_hpc.errors import UserError
from swap_hpc.parallel.mpi import host
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import Part

# Seconds to wait for the lock: a job that was just killed has let go of it by then.
PATIENCE = 10.0

# Seconds to wait where this job itself, before it was put back into the queue, holds the lock:
# a file server may keep the locks of its old node for a while.
SAME_JOB_PATIENCE = 300.0

# The errors of file systems that have no locks.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def owning(out: Path, chosen: Part | None, world: Team) -> Iterator[None]:
    """Hold a run's folder for this job; jobs that each refine one group share it.

    The first rank has a lock of the system (flock), which ends with its process however that
    ends: what a killed job left behind is no obstacle. On a file system without locks nothing is
    held.

    Args:
        out: the folder; it is made where it does not exist.
        chosen: the part of the run that this job does; None is the whole run.
        world: all ranks of the job.

    Raises:
        UserError: on all ranks, another job, which the message names, holds the folder, or it
            cannot be written.
    """
    with ExitStack() as held:
        world.first(lambda: _take(out, chosen, held))
        yield


def _take(out: Path, chosen: Part | None, held: ExitStack) -> None:
    """Lock the folder, or share it and lock a group in it, until `held` is closed."""
    group = chosen.group if chosen is not None else None
    try:
        out.mkdir(parents=True, exist_ok=True)
        if chosen is None or group is None:
            held.enter_context(_locked(out / ".lock", fcntl.LOCK_EX))
        else:
            held.enter_context(_locked(out / ".lock", fcntl.LOCK_SH))
            held.enter_context(_locked(out / f".lock-{chosen.name}", fcntl.LOCK_EX))
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            where = error.filename or out
            raise UserError(
                f"cannot write {where}: {error.strerror}: choose another --out"
            ) from None


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    """Hold a lock file; the kind is fcntl.LOCK_EX or fcntl.LOCK_SH."""
    file = _acquire(path, kind)
    try:
        if kind == fcntl.LOCK_EX:
            path.write_text(_me(), encoding="utf-8")
        yield
    finally:
        if kind == fcntl.LOCK_EX:
            # Removed before it is unlocked: who gets the lock then sees that its file is gone.
            with suppress(OSError):  # the folder may have become read-only
                path.unlink()
        os.close(file)


def _acquire(path: Path, kind: int) -> int:
    """Lock a file, wait for it if need be, and return its descriptor.

    Raises:
        UserError: another job keeps it.
    """
    begin = time.monotonic()
    while (file := _try_to_lock(path, kind)) is None:
        owner = _owner(path)
        # Where the owner has not written its name yet, it may be this job, too.
        may_be_this_job = bool(_job()) and (not owner or owner.endswith(_job()))
        patience = SAME_JOB_PATIENCE if may_be_this_job else PATIENCE
        if time.monotonic() - begin > patience:
            raise UserError(
                f"{path.parent} is in use by {owner or 'another job'}: "
                "wait for it, or choose another --out"
            )
        time.sleep(0.2)
    return file


def _try_to_lock(path: Path, kind: int) -> int | None:
    """Lock a file and return its descriptor; None where another job holds it."""
    while True:
        try:
            file = _open_locked(path, kind)
        except BlockingIOError:
            return None
        if _is_file_at(path, file):
            return file
        os.close(file)  # its owner removed it while we opened it: lock the file that is there now


def _open_locked(path: Path, kind: int) -> int:
    """Open and lock a file, which is made where it does not exist, and return its descriptor."""
    # NFS locks only files that are open for writing. On other file systems, such a file would
    # keep the disk from being remounted read-only.
    try:
        return _open_locked_for(os.O_RDONLY, path, kind)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
    return _open_locked_for(os.O_RDWR, path, kind)


def _open_locked_for(access: int, path: Path, kind: int) -> int:
    file = os.open(path, access | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def _is_file_at(path: Path, file: int) -> bool:
    """Return whether an open file is the one that the path names now."""
    try:
        return os.stat(path).st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    """Return who holds a lock file, "" where the file has just been made or removed.

    The file that jobs of single groups share does not name them: the first of their own lock
    files that is held does.
    """
    shared_by = sorted(path.parent.glob(".lock-group-*")) if path.name == ".lock" else []
    for held in [*filter(_is_held, shared_by), path]:
        with suppress(OSError):
            if text := held.read_text(encoding="utf-8"):
                return text
    return ""


def _is_held(path: Path) -> bool:
    """Return whether a process holds the exclusive lock of a file."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(file)


def _me() -> str:
    return f"process {os.getpid()} on {host()}{_job()}"


def _job() -> str:
    """Return Slurm's number of this job, which it keeps when it is put back into the queue."""
    number = os.environ.get("SLURM_JOB_ID")
    return f", job {number}" if number else ""
