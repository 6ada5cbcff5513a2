"""A thread per rank that ends the job where a rank hangs, and a rank whose launcher has died."""

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from swap_hpc.errors import RunError, Stopped, UserError
from swap_hpc.parallel.atomic import ask_guards
from swap_hpc.parallel.grid import Ranks
from swap_hpc.parallel.launcher import PARENT, launched
from swap_hpc.parallel.mpi import host
from swap_hpc.run.ending import fail_in_thread
from swap_hpc.run.standstill import Standstill
from swap_hpc.train.control import Control

STDERR = 2  # file descriptor
WAITING = ", waiting for other groups"  # the end of a sign of life


@contextmanager
def watching(control: Control, minutes: float, folder: Path, ranks: Ranks) -> Iterator[None]:
    """End all ranks, with exit code 3, where one makes no progress for too long.

    Each rank watches its own progress; a rank that waits for other groups does not hang. The
    message is followed by the stacks of all threads of the rank that reports.

    A process that stands still as a whole, because it was suspended or is stuck in the kernel,
    cannot report: its watchdog stands still, too. Therefore the first rank of each group keeps
    changing a file, and the first rank of the group before it reads that file: it notices a
    standstill after 1.2 times as long. The other ranks of a group wait for their first rank.

    Groups that wait for each other make no progress, and none of them hangs. Where their hosts are
    cut off from each other, but not from the files, all of them wait: the first rank sees that in
    the files, after 1.2 times as long, too.

    Args:
        control: where this rank notes its progress.
        minutes: without progress, at most; 0: any number.
        folder: of the files, shared by all ranks.
        ranks: of the job.
    """
    world, group = ranks.world, ranks.group
    signs = None
    if group.rank == 0 and group.size < world.size:
        # groups are of one size, and their ranks follow each other
        firsts = range(0, world.size, group.size) if world.rank == 0 else ()
        everyone = [_alive_file(folder, rank) for rank in firsts]
        after = (world.rank + group.size) % world.size
        own, neighbour = _alive_file(folder, world.rank), _alive_file(folder, after)
        signs = _SignsOfLife(own, neighbour, everyone)
    name = f"rank {ranks.world.rank}, process {os.getpid()} on {host()}"
    watchdog = _Watchdog(name, control, minutes * 60, signs)
    watchdog.start()
    try:
        yield
    except (Stopped, UserError):  # raised on all ranks
        watchdog.end()
        raise
    # After any other error the watchdog stays: other ranks may wait for this one.
    watchdog.end()


def _alive_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.alive"


@dataclass
class _SignsOfLife:
    """Files by which processes show each other that they run."""

    own: Path  # this process keeps changing it
    neighbour: Path  # another process does
    everyone: list[Path]  # the files of all groups, on the first rank alone
    count: int = 0  # of signs given

    def give(self, where: str, is_waiting: bool) -> None:
        """Change this process's file, which names the place of its last heartbeat."""
        self.count += 1
        waiting = WAITING if is_waiting else ""
        text = f"{self.own.stem}, after {where} (sign of life {self.count}){waiting}"
        # The next save meets a full disk, too, and ends the run; so does the first rank's heartbeat
        # where the folder is another job's by now.
        with suppress(OSError, RunError):
            ask_guards(self.own)
            self.own.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.own.with_suffix(".part")
            temporary.write_text(text, encoding="utf-8")
            temporary.rename(self.own)

    def read(self) -> str | None:
        """Return the neighbour's text; None on a file system that the ranks do not share."""
        return _text_of(self.neighbour)

    def all_wait(self) -> bool:
        """Tell whether every group shows that it waits for others; False on other ranks."""
        signs = map(_text_of, self.everyone)
        return bool(self.everyone) and all(sign and sign.endswith(WAITING) for sign in signs)


def _text_of(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text(encoding="utf-8")
    return None


@dataclass
class _Watchdog:
    name: str  # of this process, for a person
    control: Control
    limit: float  # seconds; 0: none
    signs: _SignsOfLife | None  # None on a rank without a neighbour
    over: threading.Event = field(default_factory=threading.Event)
    own: Standstill = field(default_factory=Standstill)
    others: Standstill = field(default_factory=Standstill)
    all_wait: Standstill = field(default_factory=Standstill)
    exchanged: float = 0.0  # when the last sign of life was given

    def start(self) -> None:
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.thread.start()

    def end(self) -> None:
        self.over.set()
        self.thread.join()

    def _run(self) -> None:
        interval = min(1.0, self.limit / 10) if self.limit else 1.0
        checked = monotonic()
        while not self.over.wait(interval):
            now = monotonic()
            # More than that has passed only while this process was suspended.
            passed = min(now - checked, 2 * interval)
            checked = now
            if launched() and os.getppid() != PARENT:
                # The launcher has died, and with it what shows messages and what aborts ranks;
                # the other ranks notice it, too.
                os._exit(3)
            if self.limit:
                self._check_progress(passed)
                self._check_neighbour(now)

    def _check_progress(self, passed: float) -> None:
        # Read before the heartbeats: at the end of a wait the last heartbeat comes first.
        is_waiting = self.control.is_waiting
        seconds = self.own.update((self.control.heartbeats, is_waiting), passed)
        if seconds > self.limit and not is_waiting:
            _end(
                f"no progress for {self.limit:.3g} s after {self.control.where}: "
                "this rank, or one that it waits for, hangs",
                self._print_stacks,
            )

    def _check_neighbour(self, now: float) -> None:
        interval = self.limit / 10
        if self.signs is None or now - self.exchanged < interval:
            return
        passed = min(now - self.exchanged, 2 * interval)
        self.exchanged = now
        self.signs.give(self.control.where, self.control.is_waiting)
        # One group that trains may take its time, but a wait of all for each other is over at once.
        all_wait = self.control.is_waiting and self.signs.all_wait()
        if (
            self.all_wait.update((all_wait, self.control.heartbeats), passed) > 1.2 * self.limit
            and all_wait
        ):
            _end(
                f"all groups have waited for each other for {1.2 * self.limit:.3g} s: "
                "a host, or the network between hosts, is lost"
            )
        sign = self.signs.read()
        if sign and self.others.update(sign, passed) > 1.2 * self.limit:
            _end(f"the process of {sign} has stood still for {self.limit:.3g} s")

    def _print_stacks(self) -> None:
        print(f"Python stacks of {self.name}:", file=sys.stderr, flush=True)
        # The descriptor itself: a program may have replaced sys.stderr by something without one.
        faulthandler.dump_traceback(file=STDERR, all_threads=True)


def _end(reason: str, details: Callable[[], object] | None = None) -> None:
    """End the job with exit code 3 and one line, and with more details after that line."""
    fail_in_thread(f"swap-hpc: {reason} (watchdog.minutes sets the limit)", details)
