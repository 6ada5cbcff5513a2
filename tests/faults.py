r"""`swap-hpc ...` in which one rank meets a fault at one place of the run.

    python faults.py '{"kind": "kill", "place": "refine", "rank": 1, "mark": "fired.json", ...}' \
        train digits ...

The fault is real: a signal, an exception, a process that stands still, a full disk. This program
only chooses the moment. It also makes ranks have a team check at every step. Without a fault ({}
in its place) it is `swap-hpc`, but for a shorter wait for an owner whose host was lost.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpi4py import MPI

from swap_hpc import __main__ as cli
from swap_hpc import swap
from swap_hpc.parallel import atomic, launcher
from swap_hpc.run import lock, loop
from swap_hpc.run.taking import Rhythm
from swap_hpc.train import control, team_check

KINDS = (
    "kill",
    "kill_all",
    "sigterm",
    "sigusr1",
    "exception",
    "hang",
    "kill_in_save",
    "disk_full",
    "torn_file",
    "two_owners",
    "host_lost",
)
PLACES = ("large_batch", "between", "refine", "average", "batchnorm")
PLACES_OF_STEPS = {"l": "large_batch", "r": "refine"}  # by the first letter of `Control.where`


@dataclass(frozen=True)
class Fault:
    """A fault that happens once, on one rank, at one place."""

    kind: str
    place: str
    rank: int
    mark: str  # file that is written when the fault happens; holds the time
    step: str = ""  # inside an epoch: how `Control.where` ends at the step of the fault
    stopped: bool = False  # a hang: stop the whole process (SIGSTOP), not only its main thread
    filler: str = ""  # of a full disk: the file that fills it

    def at(self, place: str, where: str = "") -> None:
        """Fail if this place, rank and step are the fault's, and it has not happened yet."""
        is_here = place == self.place and where.endswith(self.step)
        is_mine = MPI.COMM_WORLD.rank == self.rank
        if not (is_here and is_mine) or Path(self.mark).exists():
            return
        if self.kind == "kill_in_save":
            self._kill_in_next_save()
            return
        self._mark()
        getattr(self, f"_{self.kind}")()

    def _mark(self) -> None:
        Path(self.mark).write_text(json.dumps({"time": time.time()}), encoding="utf-8")

    def _kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _kill_all(self) -> None:
        siblings = self._siblings()
        if launcher.launched():
            os.kill(_launcher(), signal.SIGKILL)
        for pid in siblings:
            os.kill(pid, signal.SIGKILL)
        self._kill()

    def _sigterm(self) -> None:
        for pid in [*self._siblings(), os.getpid()]:
            os.kill(pid, signal.SIGTERM)

    def _sigusr1(self) -> None:
        os.kill(_launcher() if launcher.launched() else os.getpid(), signal.SIGUSR1)

    def _siblings(self) -> list[int]:
        """Return the process ids of the other ranks."""
        if not launcher.launched():
            return []
        children = Path(f"/proc/{os.getppid()}/task").glob("*/children")
        pids = {int(pid) for file in children for pid in file.read_text().split()}
        pids -= {os.getpid()}
        return [pid for pid in pids if b"faults.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def _exception(self) -> None:
        raise ArithmeticError(f"rank {self.rank} cannot go on")

    def _hang(self) -> None:
        if self.stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(10_000)

    def _disk_full(self) -> None:
        with suppress(OSError), open(self.filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def _torn_file(self) -> None:
        self._kill()

    def _two_owners(self) -> None:
        self._wait_for_the_other_side()
        self._mark()
        self._sigterm()

    def _host_lost(self) -> None:
        self._wait_for_the_other_side()

    def _wait_for_the_other_side(self) -> None:
        """Stay here until what happens outside of this run has happened."""
        while not Path(self.mark).with_suffix(".released").exists():
            time.sleep(0.01)

    def _kill_in_next_save(self) -> None:
        """Make the next save end in the middle of its file."""

        def flush(path: Path) -> None:
            os.truncate(path, max(1, path.stat().st_size // 2))
            self._mark()
            self._kill()

        atomic._flush = flush


def _launcher() -> int:
    """Return the process that a user started: the parent, or with MPICH the parent's parent."""
    parent = os.getppid()
    process = Path(f"/proc/{parent}")
    if not (process / "comm").read_text(encoding="utf-8").startswith("hydra"):
        return parent
    # The parent's id is the second field after the name, which may hold spaces and parentheses.
    after_name = (process / "stat").read_text(encoding="utf-8").rpartition(")")[2]
    return int(after_name.split()[1])


def install(fault: Fault) -> None:
    """Replace functions of the package by versions that meet the fault."""
    team_check.CHECK_SECONDS = 0.0
    heartbeat, average, events = control.Control.heartbeat, swap.average_weights_, swap.swap

    def watched_heartbeat(self: control.Control, where: str) -> None:
        heartbeat(self, where)
        place = PLACES_OF_STEPS.get(where[0]) if ", step " in where else None
        if place:
            fault.at(place, where)
        elif where == "the batch-norm refresh":
            fault.at("batchnorm")

    def watched_average(*arguments: Any) -> None:
        fault.at("average")
        average(*arguments)

    def watched_events(*arguments: Any) -> Iterator[swap.Event]:
        for event in events(*arguments):
            if isinstance(event, swap.LargeBatchEnded):
                fault.at("between")
            yield event

    control.Control.heartbeat = watched_heartbeat  # type: ignore[method-assign]
    swap.average_weights_ = watched_average  # type: ignore[assignment]
    loop.swap = watched_events  # type: ignore[assignment]


if __name__ == "__main__":
    # An owner whose host was lost is dead after 3 s.
    lock.RHYTHM = Rhythm(heartbeat=0.5, standstill=3.0)
    if given := json.loads(sys.argv.pop(1)):
        install(Fault(**given))
    cli.main()
