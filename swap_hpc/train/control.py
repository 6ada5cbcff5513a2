"""State that a rank's training loop, signal handlers and watchdog share."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from types import FrameType

from swap_hpc.recipe.schema import Checkpoint

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def ignore_stops() -> None:
    """Ignore signals that ask for a stop, in a process that has finished its work.

    The process would otherwise be ended by one, with the exit code of the signal: Python removes
    its handlers before it unloads torch, and srun sends SIGTERM to ranks that leave later than the
    first.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Control:
    """What one rank is asked from outside, and how far it has come.

    Plain fields, which signal handlers and other threads can touch. Training asks it at step
    boundaries and sends it a heartbeat with every step; it never acts by itself.
    """

    save_seconds: float = float("inf")  # between saves inside an epoch, at most
    min_seconds: float = 0.0  # between saves that the recipe asks for, at least
    stop: bool = False  # a signal asked for it
    saved_at: float = field(default_factory=monotonic)
    heartbeats: int = 0  # grows with every step, batch and file while this rank makes progress
    where: str = "the start"  # the place of the last heartbeat
    is_waiting: bool = False  # for other groups: if there is no progress, the fault is not here

    def save_as(self, settings: Checkpoint) -> None:
        """Take the times between saves from a recipe."""
        self.save_seconds = settings.minutes * 60 or float("inf")
        self.min_seconds = settings.min_seconds

    def due(self, wanted: bool = False) -> bool:
        """Tell whether this rank wants a save at the next step boundary.

        Args:
            wanted: the recipe asks for a save there.
        """
        since = monotonic() - self.saved_at
        return self.stop or since >= self.save_seconds or (wanted and since >= self.min_seconds)

    def heartbeat(self, where: str) -> None:
        """Note that this rank makes progress, and where."""
        self.where = where
        self.heartbeats += 1

    def saved(self) -> None:
        """Note that a save was written."""
        self.saved_at = monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wait for other groups: the watchdog does not count the time."""
        self.is_waiting = True
        yield
        # first the heartbeat: the watchdog must not take the wait for a standstill
        self.heartbeats += 1
        self.is_waiting = False

    def listen(self) -> None:
        """Let SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask for a stop; a second SIGINT interrupts."""
        for number in STOPPING:
            signal.signal(number, self._asked)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        self.stop = True
