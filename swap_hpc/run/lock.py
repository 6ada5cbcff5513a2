"""A run's folder has one owner: a second job that is started into it ends, instead of both writing the same files."""

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

PATIENCE = 10.0  # seconds in which a job that was just killed has let go


SAME_JOB = 300.0  # seconds: a job that was put back into the queue, whose old node's locks a file server may keep for a while


WITHOUT_LOCKS = (
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EINVAL,
)  # what file systems without them say


@contextmanager
def owning(out: Path, chosen: Part | None, world: Team) -> Iterator[None]:
    """Holds the folder `out` for this job; jobs that refine one group each share it.

    The first rank has a lock of the system (flock), which ends with its process however that ends: what a killed job
    left behind is no obstacle. Raises UserError, on all ranks, where another job holds the folder, and names it. On
    file systems without locks nothing is held.
    """
    with ExitStack() as held:
        world.first(lambda: _take(out, chosen, held))
        yield


def _take(out: Path, chosen: Part | None, held: ExitStack) -> None:
    whole = out / ".lock"
    group = None
    if chosen is not None and chosen.group is not None:
        group = out / f".lock-{chosen.name}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(_locked(whole, fcntl.LOCK_EX if group is None else fcntl.LOCK_SH))
        if group:
            held.enter_context(_locked(group, fcntl.LOCK_EX))
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise UserError(
                f"cannot write {error.filename or out}: {error.strerror}: choose another --out"
            ) from None


@contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    file = _acquired(path, kind)
    try:
        if kind == fcntl.LOCK_EX:
            path.write_text(_me(), encoding="utf-8")
        yield
    finally:
        if kind == fcntl.LOCK_EX:
            with suppress(OSError):  # a folder that has become read-only
                path.unlink()  # while it is held: who waits for it looks whether it is still there
        os.close(file)


def _acquired(path: Path, kind: int) -> int:
    """The descriptor of a lock file that is held. Raises UserError where another job keeps it."""
    begin, access = time.monotonic(), os.O_RDONLY
    while True:
        file = os.open(path, access | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
        except OSError as error:
            os.close(file)
            if error.errno != errno.EBADF or access == os.O_RDWR:
                raise
            access = os.O_RDWR  # as NFS wants it; elsewhere a file that is open for writing would keep its disk from being unmounted
            continue
        else:
            if _is_there(path, file):
                return file
            os.close(file)
            continue
        owner = _owner(path)
        is_this_job = _job() and owner.endswith(_job()) if owner else _job()
        if time.monotonic() - begin > (SAME_JOB if is_this_job else PATIENCE):
            raise UserError(
                f"{path.parent} is in use by {owner or 'another job'}: wait for it, or choose another --out"
            )
        time.sleep(0.2)


def _is_there(path: Path, file: int) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(file).st_ino
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    """Who holds a lock file; of the one that jobs of a group each share, one of them.

    Empty where the file has just been made, or removed.
    """
    shared_by = sorted(path.parent.glob(".lock-group-*")) if path.name == ".lock" else []
    for held in [*filter(_is_held, shared_by), path]:
        with suppress(OSError):
            if text := held.read_text(encoding="utf-8"):
                return text
    return ""


def _is_held(path: Path) -> bool:
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
    """Slurm's number of this job, which it keeps when it is put back into the queue."""
    number = os.environ.get("SLURM_JOB_ID")
    return f", job {number}" if number else ""
