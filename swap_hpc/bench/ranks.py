"""`ranks`: what the set-up of a run sends and keeps on each rank, against the number of ranks."""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from swap_hpc.bench.laws import fitted
from swap_hpc.bench.traffic import Sent, Traffic
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import load_recipe
from swap_hpc.recipe.markdown import markdown_table
from swap_hpc.run.run import train
from swap_hpc.train.control import Control

NUMBERS = (1, 2, 4, 8, 16, 32)
PROJECTED = 4096

# A run of one step of phase 1 and a few of a group for each rank, of a tiny model.
FIELDS = (
    "model.width=4",
    "large_batch.epochs=1",
    "refine.epochs=1",
    "refine.batch_size=256",
    "batchnorm.batch_size=64",
    "evaluate.every=0",
    "watchdog.minutes=0",
)
IMAGES = 1198  # of training in `digits`

# The heartbeat that ends each stage of a run, in their order.
STAGES = {
    "preparation": "the dry step before training",
    "dry step": "the set-up",
    "Horovod's start": "the start of large_batch",
    "first step": "large_batch, epoch 1, step 1",
    "end of phase 1": "large_batch",
    "refinement": "refine",
    "average": "average",
    "batch norm": "batchnorm",
    "result": "the result",
}
SET_UP = ("preparation", "dry step", "Horovod's start")

# Stages in the table of laws. In the others Horovod runs, which sends more the longer they take.
SHOWN = ("set-up", *(name for name in STAGES if name not in ("first step", "end of phase 1")))

QUANTITIES = ("messages", "bytes")


class _Marks(Control):
    """A rank's control that notes, at the end of each stage, what has been sent until then."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic
        self.begin = traffic.counts()  # MPI has been started
        self.sent: dict[str, Sent] = {}  # stage -> at its end
        self.wall: dict[str, float] = {}  # stage -> `time.time()` at its end
        self.cpu: dict[str, float] = {}  # stage -> CPU seconds of this process at its end

    def heartbeat(self, where: str) -> None:
        super().heartbeat(where)
        for stage, last in STAGES.items():
            if where == last and stage not in self.sent:
                self.sent[stage] = self.traffic.counts()
                self.wall[stage], self.cpu[stage] = time.time(), time.process_time()

    def stages(self) -> dict[str, Sent]:
        """Return what each stage sent."""
        before = [self.begin, *self.sent.values()]
        return {
            stage: end.since(begin)
            for (stage, end), begin in zip(self.sent.items(), before, strict=False)
        }


def measure(world: Team, case: dict[str, Any]) -> dict[str, Any]:
    """Measure a whole run of a tiny recipe, a group for each rank.

    Args:
        world: all ranks.
        case: `launched`, the `time.time()` at which the ranks were launched.

    Returns:
        The ranks, the seconds from the launch to the first step, memory, and what each stage sent.

    Raises:
        UserError: the MPI library does not count what it sends.
    """
    marks = _Marks(Traffic(world))
    sizes = (f"groups={world.size}", f"large_batch.batch_size={_batch_size(world.size)}")
    recipe = load_recipe("digits", (*FIELDS, *sizes))
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w", encoding="utf-8") as nobody:
        out = Path(world.broadcast(folder)) / "run"
        train(recipe, out, world, Console(file=nobody), marks, time.perf_counter())
        marks.heartbeat(STAGES["result"])
        world.barrier()
    memory = _over_ranks(world, [_peak_memory(), _own_memory()])
    cpu = _over_ranks(world, [marks.cpu["first step"]])[:, 0]
    return {
        "ranks": world.size,
        "seconds": world.maximum(marks.wall["first step"] - case["launched"])[0],
        "cpu_seconds": float(np.median(cpu)),
        "memory_mib": dict(zip(("peak", "own"), np.median(memory, axis=0).tolist(), strict=True)),
        "stages": {stage: _figures(world, sent) for stage, sent in marks.stages().items()}
        | {"set-up": _figures(world, marks.sent[SET_UP[-1]].since(marks.begin))},
    }


def fits(number: int, case: dict[str, Any]) -> bool:
    """Tell whether so many ranks of a measured case's size fit into this host's free memory."""
    with open("/proc/meminfo", encoding="ascii") as file:
        free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return number * case["memory_mib"]["own"] < free / 1024


def _batch_size(ranks: int) -> int:
    """Return the largest batch of the images that so many ranks can share."""
    return IMAGES // ranks * ranks


def _peak_memory() -> float:
    """Return the most resident memory of this process so far, in MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _own_memory() -> float:
    """Return the resident memory of this process that belongs to no file, in MiB."""
    with open("/proc/self/status", encoding="utf-8") as file:
        own = sum(int(line.split()[1]) for line in file if line.startswith(("RssAnon", "RssShmem")))
    return own / 1024


def _over_ranks(world: Team, values: Sequence[float]) -> np.ndarray:
    """Return every rank's values, (ranks, n); collective."""
    return np.array(world.allgather([*values]))


def _figures(world: Team, sent: Sent) -> dict[str, dict[str, float]]:
    """Return a stage's messages and bytes of the median and of the busiest rank; collective."""
    found = {}
    for name, counts in sent._asdict().items():
        totals = _over_ranks(world, [int(counts.sum())])[:, 0]
        received = world.sum_(counts.copy())
        found[name] = {
            "median": float(np.median(totals)),
            "most": float(totals.max()),
            "received": float(received.max()),
        }
    return found


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Return the set-up's costs for each number of ranks, as a Markdown table."""
    head = [
        "ranks",
        "launch to first step, s",
        "CPU per rank, s",
        "memory per rank, MiB",
        "of it its own",
        *(f"{quantity}, {rank} rank" for quantity in QUANTITIES for rank in ("median", "busiest")),
    ]
    rows = []
    for case in cases:
        figures = [
            figure(case, "set-up", quantity)
            for quantity in QUANTITIES
            for figure in (_median, _busiest)
        ]
        rows.append(
            (
                f"{case['ranks']}",
                f"{case['seconds']:.1f}",
                f"{case['cpu_seconds']:.1f}",
                f"{case['memory_mib']['peak']:.0f}",
                f"{case['memory_mib']['own']:.0f}",
                *(f"{each:,.0f}" for each in figures),
            )
        )
    return markdown_table(head, rows)


def laws(cases: Sequence[dict[str, Any]]) -> str:
    """Return how what each stage sends grows, with a projection, as a Markdown table."""
    several = [case for case in cases if case["ranks"] >= 4]
    if len(several) < 3:
        return "laws need three numbers of ranks of 4 and more: more memory is needed for them"
    numbers = [case["ranks"] for case in several]
    ranks = {"median": "median rank sends", "most": "most sent", "received": "most received"}
    head = [
        "stage",
        f"on {' / '.join(map(str, numbers))} ranks",
        *ranks.values(),
        f"their laws: on {PROJECTED:,}",
    ]
    rows = []
    for stage in SHOWN:
        for quantity in QUANTITIES:
            found = [case["stages"][stage][quantity] for case in several]
            values = [[each[rank] for each in found] for rank in ranks]
            measured = [" / ".join(f"{value:,.0f}" for value in each) for each in values]
            fits = [fitted(numbers, each) for each in values]
            projected = "; ".join(f"{law.name}: {law.at(PROJECTED):,.0f}" for law in fits)
            rows.append((stage, quantity, *measured, projected))
    return markdown_table(head, rows)


def _median(case: dict[str, Any], stage: str, quantity: str) -> float:
    """Return what the median rank sends."""
    return float(case["stages"][stage][quantity]["median"])


def _busiest(case: dict[str, Any], stage: str, quantity: str) -> float:
    """Return the most that a rank sends, or that one receives."""
    found = case["stages"][stage][quantity]
    return float(max(found["most"], found["received"]))
