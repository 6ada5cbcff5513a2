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

from swap_hpc.errors import Stopped, UserError
from swap_hpc.parallel.grid import Ranks
from swap_hpc.parallel.launcher import PARENT, launched
from swap_hpc.parallel.mpi import host
from swap_hpc.run.ending import fail
from swap_hpc.train.control import Control

STDERR = 2  # file descriptor


@contextmanager
def watching(control: Control, minutes: float, folder: Path, ranks: Ranks) -> Iterator[None]:
    """End all ranks, with exit code 3, where one makes no progress for too long; collective.

    Each rank watches its own progress; a rank that waits for other groups does not hang. The
    message is followed by the stacks of all threads of the rank that reports.

    A process that stands still as a whole, because it was suspended or is stuck in the kernel,
    cannot report: its watchdog stands still, too. Therefore the first rank of each group keeps
    changing a file, and the first rank of the group before it reads that file: it notices a
    standstill after 1.2 times as long. The other ranks of a group wait for their first rank.

    Args:
        control: where this rank notes its progress.
        minutes: without progress, at most; 0: any number.
        folder: of the files, shared by all ranks.
        ranks: of the job.
    """
    own = folder / f"rank-{ranks.world.rank:05d}.alive"
    mine = ranks.group.first(lambda: own)
    ring = [path for path in ranks.world.allgather(mine) if path]
    signs = None
    if mine and len(ring) > 1:
        neighbour = ring[(ring.index(mine) + 1) % len(ring)]
        signs = _SignsOfLife(mine, neighbour)
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


@dataclass
class _Standstill:
    """The seconds in which a value has not changed while this process was not suspended."""

    value: object = None
    seconds: float = 0.0

    def update(self, value: object, passed: float) -> float:
        """Return the seconds since the value changed.

        Args:
            value: as it is now.
            passed: seconds since the last call.
        """
        self.seconds = self.seconds + passed if value == self.value else 0.0
        self.value = value
        return self.seconds


@dataclass
class _SignsOfLife:
    """Files by which two processes show each other that they run."""

    own: Path  # this process keeps changing it
    neighbour: Path  # another process does
    count: int = 0  # of signs given

    def give(self, where: str) -> None:
        """Change this process's file, which names the place of its last heartbeat."""
        self.count += 1
        text = f"{self.own.stem}, after {where} (sign of life {self.count})"
        with suppress(OSError):  # the next save meets a full disk, too, and ends the run
            self.own.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.own.with_suffix(".part")
            temporary.write_text(text, encoding="utf-8")
            temporary.rename(self.own)

    def read(self) -> str | None:
        """Return the neighbour's text; None on a file system that the ranks do not share."""
        with suppress(OSError):
            return self.neighbour.read_text(encoding="utf-8")
        return None


@dataclass
class _Watchdog:
    name: str  # of this process, for a person
    control: Control
    limit: float  # seconds; 0: none
    signs: _SignsOfLife | None  # None on a rank without a neighbour
    over: threading.Event = field(default_factory=threading.Event)
    own: _Standstill = field(default_factory=_Standstill)
    others: _Standstill = field(default_factory=_Standstill)
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
        self.signs.give(self.control.where)
        sign = self.signs.read()
        if sign and self.others.update(sign, passed) > 1.2 * self.limit:
            _end(f"the process of {sign} has stood still for {self.limit:.3g} s")

    def _print_stacks(self) -> None:
        print(f"Python stacks of {self.name}:", file=sys.stderr, flush=True)
        # The descriptor itself: a program may have replaced sys.stderr by something without one.
        faulthandler.dump_traceback(file=STDERR, all_threads=True)


def _end(reason: str, details: Callable[[], object] | None = None) -> None:
    """End the job with exit code 3 and one line, and with more details after that line."""
    late = threading.Timer(15, os._exit, [3])  # where MPI cannot end the job any more
    late.daemon = True
    late.start()
    try:
        fail(3, f"swap-hpc: {reason} (watchdog.minutes sets the limit)", details=details)
    finally:
        os._exit(3)
