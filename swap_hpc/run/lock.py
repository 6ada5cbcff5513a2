"""The owner of a run's folder: a second job that is started into it ends at once.

Otherwise both would write the same files. The system's locks are not used: some network file
systems keep a lock to one host, or have none. `owner_file.py` tells how a file serves instead.
"""

import errno
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from swap_hpc.errors import RunError, Stopped, UserError
from swap_hpc.parallel.atomic import guarding
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.phase import Part
from swap_hpc.run.ending import fail_in_thread
from swap_hpc.run.owner import Owner, this_process
from swap_hpc.run.owner_file import OwnerFile
from swap_hpc.run.taking import LOOKS, Rhythm, Taking, group_files, own_file

RHYTHM = Rhythm()
TAKEN = object()  # there are no more turns: the first rank is the owner


@contextmanager
def owning(
    out: Path,
    chosen: Part | None,
    world: Team,
    say: Callable[[str], object] = print,
    rhythm: Rhythm | None = None,
    stop: Callable[[], bool] = bool,
) -> Iterator[None]:
    """Own a run's folder with this job; jobs that each refine one group share it.

    The first rank writes the owner's file, and its heartbeat is that file's time. An owner that has
    died is replaced: at once if its process was on this host, or if Slurm has put the same job back
    into the queue since; any other after `Rhythm.standstill` seconds without a heartbeat. An owner
    that is replaced because it stood still ends as soon as it goes on, and none of its ranks
    writes a file of the folder any more.

    A rank that hangs does not stop the heartbeat: the watchdog ends its job. What keeps Python's
    interpreter lock does: `safetensors` does so while it writes a file. A save of more than 80 s
    on the first rank lets a job on another host take this one for dead. On this host it does not.

    Args:
        out: the folder; it is made where it does not exist.
        chosen: the part of the run that this job does; None is the whole run.
        world: all ranks of the job.
        say: gets a line where the wait for an owner may take long.
        rhythm: None is `RHYTHM`.
        stop: tells on each rank whether it was asked to stop; the wait for an owner ends then.

    Raises:
        UserError: on all ranks, another job, which the message names, owns the folder, or it
            cannot be written.
        Stopped: on all ranks, one of them was asked to stop before this job owned the folder.
    """
    rhythm = rhythm or RHYTHM
    me = world.broadcast(this_process())
    _take(Taking(out, chosen, me, rhythm, say), world, stop)
    keeper = _Keeper(own_file(out, chosen), me, rhythm.heartbeat)
    world.first(keeper.start)
    try:
        keeper.check()
        with guarding(out, keeper.check):
            yield
    finally:
        keeper.end()


def is_owned(out: Path) -> bool:
    """Tell whether a folder has an owner, be it one that has died."""
    return any(file.look() for file in [own_file(out, None), *group_files(out)])


def _take(taking: Taking, world: Team, stop: Callable[[], bool]) -> None:
    """Become the owner with the first rank, unless a rank is asked to stop first; collective.

    Raises:
        As `owning` does.
    """
    turns = taking.turns()

    def make_folder() -> None:
        with _as_user_error(taking.out):
            taking.out.mkdir(parents=True, exist_ok=True)

    def has_to_wait() -> bool:
        with _as_user_error(taking.out):
            return next(turns, TAKEN) is not TAKEN

    world.first(make_folder)
    try:
        while world.broadcast(world.first(has_to_wait)):
            if world.any(stop()):
                raise Stopped(
                    f"stopped on request, before this job had {taking.out}: start it again to go on"
                )
            world.first(lambda: time.sleep(LOOKS))
    finally:
        turns.close()


@contextmanager
def _as_user_error(out: Path) -> Iterator[None]:
    """Turn an error of the system into one of the user's choice of a run's folder."""
    try:
        yield
    except OSError as error:
        where = Path(error.filename or out)
        where = out if where.parent == out else where  # a hidden file is nobody's business
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "make room, or choose another --out" if is_full else "choose another --out"
        raise UserError(f"cannot write {where}: {error.strerror}: {hint}") from None


@dataclass
class _Keeper:
    """What keeps the ownership of a folder: the heartbeat, and the check before each write."""

    file: OwnerFile
    me: Owner
    seconds: float  # between two heartbeats
    over: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None  # of the heartbeat, on the first rank
    is_seen: bool = False  # this rank has found this job to be the owner

    def start(self) -> None:
        """Begin the heartbeat; a warning says so where there can be none."""
        try:
            self.file.beat()
        except OSError as error:
            line = (
                f"swap-hpc: warning: {self.file.path} cannot be given a new time "
                f"({error.strerror}): a job on another host would take this one for dead"
            )
            print(line, file=sys.stderr, flush=True)
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.thread.start()

    def end(self) -> None:
        """End the heartbeat and leave the folder, on the rank that has started it."""
        if self.thread:
            self.over.set()
            self.thread.join()
            self.file.release(self.me)

    def check(self) -> None:
        """Raise RunError where this job does not own the folder any more.

        A rank that has not seen yet that it does is on a host with another folder of that name, or
        one whose file system shows the file late: it has nothing to compare with.
        """
        with suppress(OSError):  # the write that follows meets the same error
            seen = self.file.look()
            if seen and seen.owner.key == self.me.key:
                self.is_seen = True
            elif self.is_seen:
                by = f"was taken over by {seen.owner}" if seen else "has another owner, or had one,"
                raise RunError(
                    f"{self.file.path.parent} {by} while this job stood still: "
                    "it ends here, and writes nothing more"
                )

    def _run(self) -> None:
        while not self.over.wait(self.seconds):
            try:
                self.check()
            except RunError as lost:
                fail_in_thread(f"swap-hpc: {lost}")
            with suppress(OSError):  # a full disk or a lost file server: the next save tells
                self.file.beat()
