"""What a run is asked from outside, and how far it has come: plain fields, for signal handlers and other threads to touch."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def ignore_stops() -> None:
    """Keeps a process that has ended its work from being ended by a signal that asks for a stop, and its code with it.

    Python gives up its handlers before it unloads torch; srun sends SIGTERM to ranks that are slower to leave than the first.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


@dataclass
class Control:
    """Of one rank. Training asks it at step boundaries and tells it of every step; it never acts by itself."""

    save_seconds: float = float("inf")  # between saves inside an epoch, at most
    min_seconds: float = 0.0  # between saves that the recipe asks for, at least
    stop: bool = False  # a signal asked for it
    saved_at: float = field(default_factory=monotonic)
    beats: int = 0  # grows with every step, batch and file: a rank whose number stands still hangs
    where: str = "the start"  # of the last beat
    waits: bool = False  # for other groups: then it is not this rank that hangs

    def due(self, wanted: bool = False) -> bool:
        """Whether this rank wants a save at the next step boundary. `wanted`: the recipe asks for one there."""
        since = monotonic() - self.saved_at
        return self.stop or since >= self.save_seconds or (wanted and since >= self.min_seconds)

    def beat(self, where: str) -> None:
        self.where = where
        self.beats += 1

    def saved(self) -> None:
        self.saved_at = monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.waits = True
        yield
        self.beats += 1  # first: the watchdog must not take the wait for a standstill
        self.waits = False

    def listen(self) -> None:
        """Lets SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask for a stop, and a second SIGINT interrupt at once."""
        for number in STOPPING:
            signal.signal(number, self._asked)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
        self.stop = True
