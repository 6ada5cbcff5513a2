"""A file that names the owner of a run's folder, on file systems without dependable locks.

What is atomic everywhere, old NFS included, is a hard link to a name that must be new. So a job
writes who it is into a file of its own and links it to the name: the file is there with its whole
content, and of several jobs one succeeds. Where a file system has no hard links, the file is made
by exclusive creation.

An owner is replaced in the same way. `.owner` names the owner X. Who finds that X is dead links a
claim, `.owner.KEY` with X's key in its name: again only one can. A claim counts only if `.owner`,
or the claim on the one before it, still names X: so a job that looked long ago, at an owner which
others have replaced since, claims in vain. The new owner then moves its claim to `.owner`. If it
dies before that, the next one claims its claim.
"""

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from swap_hpc.run.owner import Owner, owner_of

# The errors of file systems without hard links.
WITHOUT_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

# The errors of file systems on which a program cannot set a file's time.
WITHOUT_TIMES = (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS)

TRIES = 10  # to read a file that other hosts replace meanwhile


class Seen(NamedTuple):
    """An owner, and the time of its last heartbeat, by the file server's clock."""

    owner: Owner
    heartbeat: int


@dataclass(frozen=True)
class OwnerFile:
    """The name of a file which tells who owns a folder, or a part of the run in it."""

    path: Path

    def look(self) -> Seen | None:
        """Return the present owner, None where there is none."""
        return self._end()[1]

    def _end(self) -> tuple[Path, Seen | None]:
        """Return the last of the claims, which names the present owner, and what it holds."""
        path, last = self.path, None
        place = path
        while (seen := _read(place)) is not None:
            path, last = place, seen
            place = self._claim_on(seen.owner)
        return path, last

    def is_owned_by(self, me: Owner) -> bool:
        seen = self.look()
        return seen is not None and seen.owner.key == me.key

    def take(self, me: Owner, dead: Owner | None) -> bool:
        """Become the owner, and return whether that succeeded: one of several jobs does.

        Args:
            me: this process.
            dead: the owner to replace; None where there is none. It may be this process, if what
                it saw before was out of date.
        """
        if dead is None or dead.key != me.key:
            place = self.path if dead is None else self._claim_on(dead)
            is_made = _create(place, me.to_json())
            # What counts is what the server shows: its answer to the creation may have been lost.
            if not self.is_owned_by(me):  # `dead` had been replaced, or had left
                if is_made:
                    place.unlink(missing_ok=True)
                return False
        return self._settle(me)

    def _settle(self, me: Owner) -> bool:
        """Move a claim that counts to its place; return whether this process is the owner."""
        path, seen = self._end()
        if seen is None or seen.owner.key != me.key:
            return False
        if path != self.path:
            # It may have been replaced in turn, if this process stood still for long.
            with suppress(FileNotFoundError):
                path.rename(self.path)
        self._sweep(me)
        return self.is_owned_by(me)

    def release(self, me: Owner) -> None:
        """Remove the file, if this process is the owner."""
        with suppress(OSError):  # the folder may have become read-only
            if self.is_owned_by(me):
                self._sweep(me)
                self.path.unlink()

    def beat(self) -> None:
        """Set the file's time, by which others see that the owner lives."""
        try:
            os.utime(self.path)
        except OSError as error:
            if error.errno not in WITHOUT_TIMES:
                raise
            _write_again(self.path)

    def _claim_on(self, owner: Owner) -> Path:
        return self.path.with_name(f"{self.path.name}.{owner.key}")

    def _sweep(self, me: Owner) -> None:
        """Remove what jobs that died, or came too late, have left beside the owner's file."""
        for path in self.path.parent.glob(f"{self.path.name}.*"):
            if path != self._claim_on(me):
                path.unlink(missing_ok=True)


def _read(path: Path) -> Seen | None:
    """Return the owner that a file names, None where there is no file."""
    for tries_left in reversed(range(TRIES)):
        # An NFS client asks for a file's facts when the file is opened, not at each stat.
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                facts = os.fstat(file.fileno())
                text = file.read()
            return Seen(owner_of(text, f"inode-{facts.st_ino}"), facts.st_mtime_ns)
        except FileNotFoundError:
            break
        except OSError as error:
            # Another host has replaced the file: the next look finds the new one.
            if error.errno != errno.ESTALE or not tries_left:
                raise
    return None


def _create(path: Path, text: str) -> bool:
    """Make a file with a content; return False where there is one already."""
    draft = path.with_name(f"{path.name}.{uuid4().hex}.new")
    try:
        _write_new(draft, text)
        return _link(draft, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LINKS:
            raise
    finally:
        with suppress(OSError):
            draft.unlink()
    try:
        _write_new(path, text)
    except FileExistsError:
        return False
    return True


def _link(draft: Path, path: Path) -> bool:
    """Link a file to a second name that must be new; return False where it is taken."""
    with suppress(FileNotFoundError):  # a new owner has swept the draft away
        try:
            os.link(draft, path)
        except FileExistsError:
            # Where the answer of an NFS server is lost, its client asks again, and fails.
            # What it knows of the draft is from before; it asks when a file is opened.
            with open(draft, "rb") as file:
                return os.fstat(file.fileno()).st_nlink == 2
        return True
    return False


def _write_again(path: Path) -> None:
    """Write the first byte of a file again, which changes its time and needs no room."""
    file = os.open(path, os.O_RDWR)
    try:
        os.pwrite(file, os.pread(file, 1, 0), 0)
    finally:
        os.close(file)


def _write_new(path: Path, text: str) -> None:
    """Write a file that must be new, and flush it to the disk."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.write(file, text.encode())
        os.fsync(file)
    except OSError:
        with suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(file)
