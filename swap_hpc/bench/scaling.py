"""`scaling`: seconds, bytes sent and memory of each phase, against the number of ranks, the model's size and the data's."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from swap_hpc.bench.traffic import Traffic
from swap_hpc.data import load
from swap_hpc.parallel.devices import use_device
from swap_hpc.parallel.grid import grid, node_of
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import load_recipe
from swap_hpc.recipe.markdown import markdown_table
from swap_hpc.swap import swap
from swap_hpc.train import models
from swap_hpc.train.events import Averaged, Epoch, Refreshed
from swap_hpc.train.job import Job

Case = dict[str, int]

# width: of the ResNet-9; samples: training images
CASES: list[Case] = [
    *({"ranks": ranks, "width": 8, "samples": 4096} for ranks in (1, 2, 4, 8)),
    *({"ranks": 2, "width": width, "samples": 4096} for width in (16, 32)),
    *({"ranks": 2, "width": 8, "samples": samples} for samples in (8192, 16384)),
]
PHASES = ("large_batch", "refine", "average", "batchnorm")
FIELDS = (
    "data.name=synthetic", "evaluate.every=0", "large_batch.epochs=2", "large_batch.batch_size=1024", "refine.epochs=1", "precision=fp32",
    "batchnorm.samples=2048", "batchnorm.batch_size=128",
)  # fmt: skip


def measure(world: Team, case: Case) -> dict[str, Any]:
    """One case, a group for each rank: two epochs of phase 1 (the second counts), one of phase 2, the average. The largest rank's."""
    traffic = Traffic(world)
    with node_of(world) as node:
        device = use_device(world, node, "auto")
    recipe = load_recipe(
        "cifar10-cpu",
        (
            *FIELDS,
            f"groups={world.size}",
            f"model.width={case['width']}",
            f"data.samples={case['samples']}",
        ),
    )
    job = Job(recipe, load(recipe.data, world, device.threads), device)
    model = models.build(recipe.model, 10, 3, 0).to(device.torch)
    figures = dict.fromkeys(PHASES, (0.0, 0))  # seconds, bytes
    memory = 0
    with grid(world, world.size) as ranks:
        sent, since = traffic.sent(), perf_counter()
        for event in swap(model, job, ranks):
            if isinstance(event, Epoch):
                memory = max(memory, event.peak_memory.host)
                figures[event.part.phase.value] = (event.train_seconds, traffic.sent() - sent)
            elif isinstance(event, Averaged | Refreshed):
                phase = "average" if isinstance(event, Averaged) else "batchnorm"
                figures[phase] = (perf_counter() - since, traffic.sent() - sent)
            sent, since = traffic.sent(), perf_counter()
    phases = {
        phase: dict(zip(("seconds", "bytes"), world.maximum(*pair), strict=True))
        for phase, pair in figures.items()
    }
    size = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "cores": device.threads * world.size,
    }
    batch_sizes = {"large_batch": recipe.large_batch.batch_size, "refine": recipe.refine.batch_size}
    return (
        case
        | size
        | {"batch_sizes": batch_sizes}
        | {"phases": phases, "peak_memory_mib": world.maximum(memory / 2**20)[0]}
    )


def table(cases: Sequence[dict[str, Any]]) -> str:
    head = ["ranks", "parameters", "samples"]
    head += [f"{name}, {unit}" for name in PHASES for unit in ("s", "MB sent")] + [
        "memory per rank, MiB"
    ]
    rows = []
    for case in cases:
        cells = [f"{case['ranks']}", f"{case['parameters']:,}", f"{case['samples']:,}"]
        for phase in PHASES:
            cells += [
                f"{case['phases'][phase]['seconds']:.2f}",
                f"{case['phases'][phase]['bytes'] / 1e6:.3g}",
            ]
        rows.append((*cells, f"{case['peak_memory_mib']:.0f}"))
    return markdown_table(head, rows)
