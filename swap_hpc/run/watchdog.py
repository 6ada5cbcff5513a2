"""A thread that ends the job where a rank hangs, and a rank whose launcher has died."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from swap_hpc.errors import Stopped, UserError
from swap_hpc.parallel.grid import Ranks
from swap_hpc.parallel.launcher import PARENT, launched
from swap_hpc.run.ending import fail
from swap_hpc.train.control import Control


@contextmanager
def watching(control: Control, minutes: float, folder: Path, ranks: Ranks) -> Iterator[None]:
    """Ends all ranks, with exit code 3, where one makes no progress for that many minutes (0: never).

    A rank measures its own progress: waiting for other groups is no hang. Where a process stands still as a whole (stopped, or
    stuck in the kernel) so does its watchdog. Therefore each group's first rank keeps changing a file in `folder`, and the
    first rank of the group before it looks at it: a standstill is noticed there after a fifth more time.
    """
    mine = folder / f"rank-{ranks.world.rank:05d}.alive"
    first = ranks.group.first(
        lambda: mine
    )  # the other ranks of a group stand still with their first
    ring = [path for path in ranks.world.allgather(first) if path]
    if first and len(ring) > 1:
        dog = _Watchdog(control, minutes * 60, first, ring[(ring.index(first) + 1) % len(ring)])
    else:
        dog = _Watchdog(control, minutes * 60, None, None)
    dog.start()
    try:
        yield
    except (
        Stopped,
        UserError,
    ):  # all ranks leave together; after any other error of one, the others may wait for it
        dog.end()
        raise
    dog.end()


@dataclass
class _Stillness:
    """For how long a value has not changed, in seconds during which this process itself was not suspended."""

    value: object = None
    seconds: float = 0.0

    def see(self, value: object, passed: float) -> float:
        self.seconds = self.seconds + passed if value == self.value else 0.0
        self.value = value
        return self.seconds


@dataclass
class _Watchdog:
    control: Control
    limit: float  # seconds; 0: none
    mine: Path | None  # the file that shows that this process lives
    neighbour: Path | None  # another one's
    over: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.thread.start()

    def end(self) -> None:
        self.over.set()
        self.thread.join()

    def _run(self) -> None:
        step = min(1.0, self.limit / 10) if self.limit else 1.0  # seconds between looks
        own, other = _Stillness(), _Stillness()
        looked, exchanged, count = monotonic(), 0.0, 0
        while not self.over.wait(step):
            now = monotonic()
            passed, looked = min(now - looked, 2 * step), now
            if launched() and os.getppid() != PARENT:
                os._exit(3)  # nobody is left to tell, and no MPI to end the others, who see it, too
            if not self.limit:
                continue
            waits = (
                self.control.is_waiting
            )  # before the beats, which are counted on before a wait ends
            if own.see((self.control.heartbeats, waits), passed) > self.limit and not waits:
                _end(
                    f"no progress for {self.limit:.3g} s after {self.control.where}: this rank, or one that it waits for, hangs"
                )
            if now - exchanged >= self.limit / 10:
                since, exchanged, count = min(now - exchanged, self.limit / 5), now, count + 1
                self._show(count)
                seen = _read(self.neighbour)
                if seen and other.see(seen, since) > 1.2 * self.limit:
                    _end(f"the process of {seen} stands still for {self.limit:.3g} s")

    def _show(self, count: int) -> None:
        if self.mine:
            with suppress(OSError):  # a full disk ends the run at the next save, which says so
                self.mine.parent.mkdir(parents=True, exist_ok=True)
                temporary = self.mine.with_suffix(".part")
                temporary.write_text(
                    f"{self.mine.stem}, after {self.control.where} (sign of life {count})",
                    encoding="utf-8",
                )
                temporary.rename(self.mine)


def _read(path: Path | None) -> str | None:
    """None where it was never written: on file systems that the ranks do not share."""
    with suppress(OSError):
        return path.read_text(encoding="utf-8") if path else None
    return None


def _end(reason: str) -> None:
    late = threading.Timer(15, os._exit, [3])  # where MPI cannot end the job any more
    late.daemon = True
    late.start()
    try:
        fail(3, f"swap-hpc: {reason} (watchdog.minutes sets the limit)")
    finally:
        os._exit(3)
