"""The measurement of two things in turn, A B A B ..., and the table of the results.

On a shared machine a speed alone means little. The ratio of two measurements that follow each other
does, because what else the machine does slows both.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.markdown import markdown_table

REPEATS = 5


@dataclass(frozen=True)
class Comparison:
    """Measurements of ours and of the alternative, one per repeat; a row of the table."""

    bench: str
    what: str  # ours
    peer: str  # the alternative
    unit: str
    ours: list[float]
    peers: list[float]
    bar: float | None = None  # target of the median ratio; None: reported only
    at_most: bool = False  # the bar is an upper limit; else a lower one
    difference: bool = False  # the bar is one of differences, in `unit`, not of ratios
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        """The ratio, or the difference, of ours to the alternative in each repeat; ascending."""
        pairs = zip(self.ours, self.peers, strict=True)
        if self.difference:
            return sorted(ours - peer for ours, peer in pairs)
        return sorted(ours / peer for ours, peer in pairs)

    @property
    def met(self) -> bool | None:
        """True if the median ratio meets the bar; None without a bar."""
        if self.bar is None:
            return None
        middle = median(self.ratios)
        return middle <= self.bar if self.at_most else middle >= self.bar

    def row(self) -> tuple[str, ...]:
        """Return the cells of the table's row."""
        ratios = self.ratios
        limit = "at most" if self.at_most else "at least"
        return (
            self.bench,
            self.what,
            self.peer,
            f"{median(self.ours):,.4g}",
            f"{median(self.peers):,.4g}",
            self.unit,
            f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})",
            "-" if self.bar is None else f"{limit} {self.bar:g}",
            {None: "reported", True: "met", False: "**missed**"}[self.met],
        )


HEAD = (
    "bench",
    "ours",
    "beside",
    "ours, median",
    "beside, median",
    "unit",
    "ratio, median (least to most)",
    "bar",
    "",
)


def table(comparisons: Sequence[Comparison]) -> str:
    """Return a Markdown table of the comparisons, and their notes below it."""
    rows = markdown_table(HEAD, [each.row() for each in comparisons])
    notes = [f"- {each.bench}, {each.what}: {each.note}" for each in comparisons if each.note]
    return "\n".join([rows, "", *notes]) if notes else rows


def as_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Return the comparisons' fields, their ratios, and which of them meet their bars."""
    return [asdict(each) | {"ratios": each.ratios, "met": each.met} for each in comparisons]


def from_json(rows: Sequence[dict[str, Any]]) -> list[Comparison]:
    """Return the comparisons that `as_json` turned into `rows`."""
    names = Comparison.__dataclass_fields__
    return [Comparison(**{name: row[name] for name in names if name in row}) for row in rows]


def machine() -> dict[str, Any]:
    """Return the hardware and the versions that this process measures."""
    import torch

    from swap_hpc.parallel.devices import cpu_model

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def alternately(
    ours: Callable[[], float], peer: Callable[[], float], repeats: int = REPEATS
) -> tuple[list[float], list[float]]:
    """Call two measurements in turn, and return the results of each.

    One first call of each is not counted: it warms up caches and memory pools.
    """
    ours()
    peer()
    pairs = [(ours(), peer()) for _ in range(repeats)]
    return [first for first, _ in pairs], [second for _, second in pairs]


def wait_for_gpu() -> None:
    """Wait until the GPU, if this process uses one, has done all work given to it."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass
class Clock:
    """A stopwatch for work that all ranks do together: the slowest rank counts."""

    world: Team
    began: float = field(default=0.0)

    def start(self) -> None:
        """Start on all ranks at once. Collective over `world`."""
        wait_for_gpu()
        self.world.barrier()
        self.began = time.perf_counter()

    def seconds(self) -> float:
        """Return the slowest rank's seconds since the start. Collective over `world`."""
        wait_for_gpu()
        return self.world.maximum(time.perf_counter() - self.began)[0]


def images_per_second(batches: Iterator[Any], warm_up: int = 5) -> float:
    """Consume batches of (images, labels), and return the speed after the first `warm_up`."""
    for _ in range(warm_up):
        next(batches)
    wait_for_gpu()
    begin, images = time.perf_counter(), 0
    for _, labels in batches:
        images += len(labels)
    wait_for_gpu()
    return images / (time.perf_counter() - begin)
