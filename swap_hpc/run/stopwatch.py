"""Wall seconds of a run by phase, over all its starts."""

from collections import defaultdict
from collections.abc import Mapping
from time import perf_counter

from swap_hpc.parallel.teams import Team

SECONDS = ("setup", "large_batch", "refine", "average", "batchnorm", "evaluate", "save", "total")


class Stopwatch:
    """Wall seconds by name: of this start of the run, and of the starts before it up to their last saves."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.before: dict[str, float] = {}
        self.own: defaultdict[str, float] = defaultdict(float)
        self.mark = perf_counter()

    def lap(self, name: str | None = None) -> None:
        """Adds the time since the last lap to `name`; to nothing without one."""
        now = perf_counter()
        if name:
            self.own[name] += now - self.mark
        self.mark = now

    def go_on_from(self, seconds: Mapping[str, float]) -> None:
        """`seconds`: what a save holds of the starts before. The latest save of several counts."""
        self.before = {
            name: max(value, self.before.get(name, 0.0)) for name, value in seconds.items()
        }

    def seconds(self) -> dict[str, float]:
        own = self._own()
        return {name: self.before.get(name, 0.0) + own[name] for name in SECONDS}

    def slowest(self, world: Team) -> dict[str, float]:
        """Of the ranks: in the starts before, and in this one, for which the slowest need not be the same."""
        own = world.maximum(*self._own().values())
        before = world.maximum(*(self.before.get(name, 0.0) for name in SECONDS))
        return {name: a + b for name, a, b in zip(SECONDS, before, own, strict=True)}

    def _own(self) -> dict[str, float]:
        own = {**self.own, "total": perf_counter() - self.started}
        return {name: own.get(name, 0.0) for name in SECONDS}
