"""`swap-hpc ...` in which one rank meets a fault at one place of the run: a real signal, a real exception, a real standstill.

    python faults.py '{"kind": "kill", "place": "refine", "rank": 1, "mark": "fired.json", ...}' train digits ...

Only the moment is chosen here. It also makes ranks look at each step whether they are to save or to stop.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpi4py import MPI

from swap_hpc import __main__ as cli
from swap_hpc import swap
from swap_hpc.parallel import atomic, launcher
from swap_hpc.run import loop
from swap_hpc.train import control, sync_check

KINDS = ("kill", "kill_all", "sigterm", "sigusr1", "exception", "hang", "kill_in_save")
PLACES = ("large_batch", "between", "refine", "average", "batchnorm")


@dataclass(frozen=True)
class Fault:
    kind: str
    place: str
    rank: int
    mark: str  # a file that tells when it happened
    step: str = ""  # what `Control.where` ends with, in the places inside an epoch
    stopped: bool = False  # a hang: the whole process stands still

    def at(self, place: str, where: str = "") -> None:
        """Happens, where it is this rank's turn, and only once."""
        if (
            place != self.place
            or MPI.COMM_WORLD.rank != self.rank
            or not where.endswith(self.step)
            or Path(self.mark).exists()
        ):
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
        if not launcher.launched():
            return []
        children = Path(f"/proc/{os.getppid()}/task").glob("*/children")
        pids = {int(pid) for file in children for pid in file.read_text().split()}
        return [
            pid
            for pid in pids
            if pid != os.getpid() and b"faults.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def _exception(self) -> None:
        raise ArithmeticError(f"rank {self.rank} cannot go on")

    def _hang(self) -> None:
        if self.stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(10_000)

    def _kill_in_next_save(self) -> None:
        def flush(path: Path) -> None:
            os.truncate(path, max(1, path.stat().st_size // 2))  # as far as it had come
            self._mark()
            self._kill()

        atomic._flush = flush


def _launcher() -> int:
    """The process that a user started: this one's parent, or, of MPICH, that one's parent."""
    parent = os.getppid()
    if Path(f"/proc/{parent}/comm").read_text(encoding="utf-8").startswith("hydra"):
        return int(
            Path(f"/proc/{parent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1]
        )
    return parent


def install(fault: Fault) -> None:
    sync_check.CHECK_SECONDS = 0.0
    beat, average, events = control.Control.heartbeat, swap.average_weights_, swap.swap

    def watched_beat(self: control.Control, where: str) -> None:
        beat(self, where)
        place = {"l": "large_batch", "r": "refine"}.get(where[0]) if ", step " in where else None
        fault.at(
            place or ("batchnorm" if where == "the batch-norm refresh" else ""),
            where if place else "",
        )

    def watched_average(*arguments: Any) -> None:
        fault.at("average")
        average(*arguments)

    def watched_events(*arguments: Any) -> Iterator[swap.Event]:
        for event in events(*arguments):
            if isinstance(event, swap.LargeBatchEnded):
                fault.at("between")
            yield event

    control.Control.heartbeat = watched_beat  # type: ignore[method-assign]
    swap.average_weights_ = watched_average  # type: ignore[assignment]
    loop.swap = watched_events  # type: ignore[assignment]


if __name__ == "__main__":
    install(Fault(**json.loads(sys.argv.pop(1))))
    cli.main()
