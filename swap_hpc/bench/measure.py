"""Two things measured in turn, in one run: A B A B ... A speed alone means little on a shared machine, the ratio of neighbours does."""

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
    """Ours beside a peer's: figures in `unit`, repeat by repeat."""

    bench: str
    what: str
    peer: str
    unit: str
    ours: list[float]
    peers: list[float]
    bar: float | None = None  # of the median ratio; None: reported only
    at_most: bool = False  # the ratio has to be no more than the bar; else no less
    difference: bool = False  # ours less the peer's counts, in `unit`, not the ratio
    note: str = ""

    @property
    def ratios(self) -> list[float]:
        """Or differences; ascending."""
        return sorted(
            a - b if self.difference else a / b for a, b in zip(self.ours, self.peers, strict=True)
        )

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        middle = median(self.ratios)
        return middle <= self.bar if self.at_most else middle >= self.bar

    def row(self) -> tuple[str, ...]:
        ratios = self.ratios
        sign = "at most" if self.at_most else "at least"
        verdict = {None: "reported", True: "met", False: "**missed**"}[self.met]
        bar = f"{sign} {self.bar:g}" if self.bar is not None else "-"
        middles = (f"{median(self.ours):,.4g}", f"{median(self.peers):,.4g}", self.unit)
        return (
            self.bench,
            self.what,
            self.peer,
            *middles,
            f"{median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})",
            bar,
            verdict,
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
    notes = [f"- {each.bench}, {each.what}: {each.note}" for each in comparisons if each.note]
    return "\n".join(
        [
            markdown_table(HEAD, [each.row() for each in comparisons]),
            *([""] if notes else []),
            *notes,
        ]
    )


def as_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    return [asdict(each) | {"ratios": each.ratios, "met": each.met} for each in comparisons]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
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
    """What each returns, in turn, after one run of each that does not count."""
    ours(), peer()
    pairs = [(ours(), peer()) for _ in range(repeats)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def wait_for_gpu() -> None:
    """For the work that was given to it."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass
class Clock:
    """Seconds of the slowest rank between two moments at which all ranks meet."""

    world: Team
    began: float = field(default=0.0)

    def start(self) -> None:
        wait_for_gpu()
        self.world.barrier()
        self.began = time.perf_counter()

    def seconds(self) -> float:
        wait_for_gpu()
        return self.world.maximum(time.perf_counter() - self.began)[0]


def images_per_second(batches: Iterator[Any], warm_up: int = 5) -> float:
    """Of a stream of (images, labels), after its first batches."""
    for _ in range(warm_up):
        next(batches)
    wait_for_gpu()
    begin, images = time.perf_counter(), 0
    for _, labels in batches:
        images += len(labels)
    wait_for_gpu()
    return images / (time.perf_counter() - begin)
