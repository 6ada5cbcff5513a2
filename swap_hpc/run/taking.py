"""Taking a run's folder: waiting for its present owner, refusing, or replacing a dead one.

Imports neither torch nor MPI.
"""

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from swap_hpc.errors import UserError
from swap_hpc.recipe.phase import Part
from swap_hpc.run.owner import Owner, identity_of, is_requeued, is_visible, lives
from swap_hpc.run.owner_file import OwnerFile, Seen
from swap_hpc.run.standstill import Standstill


@dataclass(frozen=True)
class Rhythm:
    """Seconds of an owner's heartbeat, and of another job's waits for it."""

    heartbeat: float = 10.0  # between two
    # Without a heartbeat an owner on another host is dead. NFS may show a file's time a minute
    # late.
    standstill: float = 90.0
    # A living owner has so long to leave: the processes of a job that is being killed end in it.
    patience: float = 10.0
    # An owner on another host has so long to show whether it lives.
    watch: float = float("inf")


AT_ONCE = Rhythm(patience=0.0, watch=0.0)  # waits for nobody

LOOKS = 0.2  # seconds between two looks at an owner
TURN = 2.0  # seconds for a job to step back from one that came at the same moment


def own_file(out: Path, chosen: Part | None) -> OwnerFile:
    """Return the file that names the owner of a folder, or of one group in it."""
    group = "" if chosen is None or chosen.group is None else f"-{chosen.name}"
    return OwnerFile(out / f".owner{group}")


def group_files(out: Path) -> list[OwnerFile]:
    """Return the files that name the owners of single groups in a folder."""
    # What has a suffix is not an owner's file: a claim, or a draft.
    return [OwnerFile(path) for path in sorted(out.glob(".owner-group-*")) if not path.suffix]


@dataclass
class Taking:
    """The attempt of a job to own a folder, or one group in it."""

    out: Path  # the folder; it exists
    chosen: Part | None  # the part of the run that this job does; None is the whole run
    me: Owner
    rhythm: Rhythm
    say: Callable[[str], object]  # gets a line where the wait may take long
    is_told: bool = field(default=False, init=False)

    @property
    def own(self) -> OwnerFile:
        """The file that names this job as soon as it is the owner."""
        return own_file(self.out, self.chosen)

    def take(self) -> OwnerFile:
        """Become the owner, and return the file that names it.

        Raises:
            As `turns` does.
        """
        for _ in self.turns():
            time.sleep(LOOKS)
        return self.own

    def turns(self) -> Generator[None, None, None]:
        """Become the owner, in turns between which the caller waits; at the end this job owns it.

        A job of one group and a job of the whole run exclude each other. Each writes its own file
        first and then looks for the other's: so at least one of two sees the other. Where both do,
        the job of the whole run steps back.

        A caller that gives up closes the iterator, and nothing of this job is left.

        Raises:
            UserError: another job, which the message names, keeps the folder.
            OSError: the folder cannot be written.
        """
        self.me = replace(self.me, folder=identity_of(self.out))
        is_alone = False
        try:
            while not is_alone:
                yield from self._replace()
                is_alone = yield from self._is_alone()
                if not is_alone:
                    self.own.release(self.me)
        finally:
            if not is_alone:
                self.own.release(self.me)

    def _others(self) -> list[OwnerFile]:
        """Return the files of owners beside which this job cannot work."""
        if self.own == own_file(self.out, None):
            return group_files(self.out)
        return [own_file(self.out, None)]

    def _is_alone(self) -> Generator[None, None, bool]:
        """Tell whether no other owner keeps this job from working."""
        is_of_one_group = self.chosen is not None and self.chosen.group is not None
        end = time.monotonic() + (TURN if is_of_one_group else 0.0)
        while any(other.look() for other in self._others()):
            if time.monotonic() > end:
                return False
            yield
        return True

    def _replace(self) -> Iterator[None]:
        """Become the owner as soon as no other keeps this job from it, or all such have died.

        Raises:
            UserError: one of them lives, and does not leave.
        """
        watches = [_Watch(file, self.me, self.rhythm) for file in (*self._others(), self.own)]
        while True:
            # all are looked at in each turn: the waits for several owners do not add up
            owners = [watch for watch in watches if not watch.finds_free()]
            for watch in owners:
                if watch.refuses():
                    raise UserError(
                        f"{self.out} is in use by {watch.owner}: "
                        "wait for it, or choose another --out"
                    )
            if owners:
                self._tell([watch.owner for watch in owners if not watch.lives])
                yield
            elif all(self._clear(watch) for watch in watches):
                return

    def _clear(self, watch: "_Watch") -> bool:
        """Remove what a dead owner has left, or put this job in its place.

        Returns:
            Whether that succeeded: another job may have been faster.
        """
        if watch.file == self.own:
            return watch.file.take(self.me, watch.owner)
        if watch.owner is None:
            return True
        is_taken = watch.file.take(self.me, watch.owner)
        watch.file.release(self.me)
        return is_taken

    def _tell(self, owners: "list[Owner | None]") -> None:
        """Say, once, that owners which have shown no sign of life are waited for."""
        if not owners or self.is_told:
            return
        self.is_told = True
        more = f" and {len(owners) - 1} more" if len(owners) > 1 else ""
        them = "them" if more else "it"
        self.say(
            f"{self.out} was left by {owners[0]}{more}, or is in use by {them}: "
            f"waiting for a sign of life, {self.rhythm.standstill:.0f} s at most"
        )


@dataclass
class _Watch:
    """What a job sees of the owner that a file names while it waits, by its own clock alone."""

    file: OwnerFile
    me: Owner
    rhythm: Rhythm
    owner: Owner | None = None  # at the last look
    standstill: Standstill = field(default_factory=Standstill)
    begun: float = 0.0  # when this owner was first seen
    looked: float = 0.0
    heartbeats: int = 0  # seen
    lives: bool = False

    def finds_free(self) -> bool:
        """Look, and tell whether nobody owns what the file names, or a dead owner, or this job."""
        seen = self.file.look()
        before, self.owner = self.owner, seen.owner if seen else None
        if seen is None or seen.owner.key == self.me.key:
            return True
        if before is None or before.key != seen.owner.key:
            # Another owner is no heartbeat of the one before it.
            self.begun = self.looked = time.monotonic()
            self.standstill, self.heartbeats = Standstill(), 0
        return self._finds_dead(seen)

    def _finds_dead(self, seen: Seen) -> bool:
        now = time.monotonic()
        # A look that takes longer shows a slow file server, not an owner that stands still.
        passed = min(now - self.looked, 5 * LOOKS)
        self.looked = now
        if self.standstill.value not in (None, seen.heartbeat):
            self.heartbeats += 1
        seconds = self.standstill.update(seen.heartbeat, passed)
        if is_visible(seen.owner, self.me):
            if not lives(seen.owner):
                return True
            if seen.owner.folder == self.me.folder:
                # Also one that is suspended, or too busy for its heartbeat, is there. But what
                # Slurm has put back into the queue has ended: what still runs of it is stuck.
                self.lives = True
                return is_requeued(seen.owner, self.me) and now - self.begun > self.rhythm.patience
        self.lives = self.heartbeats > 0
        return is_requeued(seen.owner, self.me) or seconds > self.rhythm.standstill

    def refuses(self) -> bool:
        """Tell whether the job has waited long enough for this owner."""
        limit = self.rhythm.patience if self.lives else self.rhythm.watch
        return time.monotonic() - self.begun >= limit
