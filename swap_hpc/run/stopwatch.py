"""Wall seconds of a run by phase, over all its starts."""

from collections import defaultdict
from collections.abc import Mapping
from time import perf_counter

from swap_hpc.parallel.teams import Team

SECONDS = ("setup", "large_batch", "refine", "average", "batchnorm", "evaluate", "save", "total")


class Stopwatch:
    """Wall seconds by phase: this start's, and those of earlier starts up to their last saves."""

    def __init__(self, started: float) -> None:
        """Start the first lap.

        Args:
            started: `perf_counter()` when the process began.
        """
        self.started = started
        self.before: dict[str, float] = {}  # of earlier starts
        self.own: defaultdict[str, float] = defaultdict(float)  # of this start
        self.mark = perf_counter()

    def lap(self, name: str | None = None) -> None:
        """Begin a new lap, and add the seconds of the last one to `name`, if there is one."""
        now = perf_counter()
        if name:
            self.own[name] += now - self.mark
        self.mark = now

    def resume_from(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds that a save holds; where there are several saves, the latest counts."""
        self.before = {
            name: max(value, self.before.get(name, 0.0)) for name, value in seconds.items()
        }

    def seconds(self) -> dict[str, float]:
        """Return this rank's seconds over all starts."""
        own = self._own()
        return {name: self.before.get(name, 0.0) + own[name] for name in SECONDS}

    def slowest(self, world: Team) -> dict[str, float]:
        """Return the most seconds of any rank; collective.

        Earlier starts and this one are added up after the maximum: their slowest ranks may differ.
        """
        own = world.maximum(*self._own().values())
        before = world.maximum(*(self.before.get(name, 0.0) for name in SECONDS))
        return {name: a + b for name, a, b in zip(SECONDS, before, own, strict=True)}

    def _own(self) -> dict[str, float]:
        own = {**self.own, "total": perf_counter() - self.started}
        return {name: own.get(name, 0.0) for name in SECONDS}
