"""A thread that ends the job where a rank hangs, and a rank whose launcher has died."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from swap_hpc.control import Control
from swap_hpc.ending import fail
from swap_hpc.launcher import launched
from swap_hpc.ranks import Ranks


@contextmanager
def watching(control: Control, minutes: float, folder: Path, ranks: Ranks) -> Iterator[None]:
    """Ends all ranks, with exit code 3, where one makes no progress for that many minutes (0: never).

    A rank measures itself: waiting for other groups is no hang. It leaves what it measures in a file in `folder`, where
    ranks that wait see that another one stands still as a whole (stopped, or stuck in the kernel), its watchdog with it.
    """
    mine = folder / f"rank-{ranks.world.rank:05d}.alive"
    heartbeat = ranks.group.first(lambda: mine)  # the other ranks of a group stand still with the first
    others = [path for path in ranks.world.allgather(heartbeat) if path and path != mine]
    dog = _Watchdog(control, minutes * 60, heartbeat, others)
    dog.start()
    yield
    dog.over.set()


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
    heartbeat: Path | None
    others: list[Path]
    over: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def _run(self) -> None:
        launcher = os.getppid() if launched() else None
        step = min(1.0, self.limit / 10) if self.limit else 1.0  # seconds between looks
        own, still, last, written = _Stillness(), {path: _Stillness() for path in self.others}, monotonic(), 0.0
        while not self.over.wait(step):
            passed = min(monotonic() - last, 2 * step)
            last = monotonic()
            if launcher is not None and os.getppid() != launcher:
                os._exit(3)  # nobody is left to tell, and MPI to end the others with: they see it, too
            if not self.limit:
                continue
            if last - written > self.limit / 10:
                self._write()
                written = last
            if own.see(self.control.beats, passed) > self.limit and not self.control.waits:
                _end(f"no progress for {self.limit:.3g} s after {self.control.where}: this rank, or one that it waits for, hangs")
            if self.control.waits:
                for path, each in still.items():
                    if each.see(_read(path), passed) > self.limit and not str(each.value).endswith("waits"):
                        _end(f"{path.stem} has made no progress for {self.limit:.3g} s: it hangs")

    def _write(self) -> None:
        if self.heartbeat:
            try:
                self.heartbeat.parent.mkdir(parents=True, exist_ok=True)
                self.heartbeat.write_text(f"{self.control.beats} {'waits' if self.control.waits else self.control.where}")
            except OSError:
                pass  # a full disk ends the run at the next save, which says so


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _end(reason: str) -> None:
    late = threading.Timer(15, os._exit, [3])  # where MPI cannot end the job any more
    late.daemon = True
    late.start()
    fail(3, f"swap-hpc: {reason} (watchdog.minutes sets the limit)")
