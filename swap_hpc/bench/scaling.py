"""`scaling`: seconds, bytes sent and memory of each phase against ranks, model and data."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from torch import nn

from swap_hpc.bench.traffic import Traffic
from swap_hpc.data import load
from swap_hpc.errors import UserError
from swap_hpc.parallel.devices import use_device
from swap_hpc.parallel.grid import grid, node_of
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import load_recipe
from swap_hpc.recipe.markdown import markdown_table
from swap_hpc.recipe.wording import count
from swap_hpc.swap import swap
from swap_hpc.train import models
from swap_hpc.train.events import Averaged, Epoch, Refreshed
from swap_hpc.train.job import Job

Case = dict[str, int]

# The width of a ResNet-9 and the number of training images; one of the three varies at a time.
CASES: list[Case] = [
    *({"ranks": ranks, "width": 8, "samples": 4096} for ranks in (1, 2, 4, 8)),
    *({"ranks": 2, "width": width, "samples": 4096} for width in (16, 32)),
    *({"ranks": 2, "width": 8, "samples": samples} for samples in (8192, 16384)),
]
PHASES = ("large_batch", "refine", "average", "batchnorm")
FIELDS = (
    "data.name=synthetic",
    "evaluate.every=0",
    "large_batch.epochs=2",
    "large_batch.batch_size=1024",
    "refine.epochs=1",
    "precision=fp32",
    "batchnorm.samples=2048",
    "batchnorm.batch_size=128",
)


# The fields that a case sets.
OF_CASES = ("groups", "model.width", "data.samples")


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UserError for fields that cannot be measured with, before any rank starts."""
    for override in overrides:
        name = override.partition("=")[0]
        if name in OF_CASES:
            raise UserError(f"--set {name}: bench scaling varies it itself: leave it out")
    recipe = load_recipe("cifar10-cpu", (*FIELDS, *overrides))
    if not (recipe.large_batch.epochs and recipe.refine.epochs):
        raise UserError("bench scaling measures both phases: give each an epoch or more")
    small, large = recipe.refine.batch_size, recipe.large_batch.batch_size
    if small >= large:
        raise UserError(
            f"refine.batch_size={small} is not below large_batch.batch_size={large}: "
            "plan takes the cost of a step from small and large ones"
        )


def measure(world: Team, case: Case, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure one case, with a group per rank.

    It trains two epochs of phase 1, of which the second counts, and one of phase 2, and averages.

    Args:
        world: all ranks.
        case: the number of ranks, the width of the ResNet-9, the number of images.
        overrides: of the recipe, such as "precision=bf16".

    Returns:
        The case with the seconds and bytes of each phase, and the peak memory in MiB; the largest
        rank's each.

    Raises:
        UserError: the MPI library does not count what it sends.
    """
    traffic = Traffic(world)
    with node_of(world) as node:
        device = use_device(world, node, "auto")
        on_a_host = world.maximum(node.size)[0]
    sizes = (
        f"groups={world.size}",
        f"model.width={case['width']}",
        f"data.samples={case['samples']}",
    )
    recipe = load_recipe("cifar10-cpu", (*FIELDS, *overrides, *sizes))
    job = Job(recipe, load(recipe.data, world, device.threads), device)
    model = models.build(recipe.model, 10, 3, 0).to(device.torch)
    figures, memory = _run_phases(world, job, model, traffic)
    phases = {
        phase: dict(zip(("seconds", "bytes"), world.maximum(*pair), strict=True))
        for phase, pair in figures.items()
    }
    return {
        **case,
        "parameters": sum(p.numel() for p in model.parameters()),
        "cores": device.threads * world.size,
        "ranks_on_a_host": on_a_host,
        "batch_sizes": {
            "large_batch": recipe.large_batch.batch_size,
            "refine": recipe.refine.batch_size,
        },
        "phases": phases,
        "peak_memory_mib": world.maximum(memory / 2**20)[0],
    }


def _run_phases(
    world: Team, job: Job, model: nn.Module, traffic: Traffic
) -> tuple[dict[str, tuple[float, int]], int]:
    """Run SWAP, and return each phase's seconds and bytes on this rank, and the peak memory."""
    figures = dict.fromkeys(PHASES, (0.0, 0))
    memory = 0
    with grid(world, world.size) as ranks:
        sent, since = traffic.sent(), perf_counter()
        for event in swap(model, job, ranks):
            seconds, bytes_sent = perf_counter() - since, traffic.sent() - sent
            if isinstance(event, Epoch):
                memory = max(memory, event.peak_memory.host)
                # A phase's last epoch stays: the first one also gives all ranks the weights.
                figures[event.part.phase.value] = (event.train_seconds, bytes_sent)
            elif isinstance(event, Averaged):
                figures["average"] = (seconds, bytes_sent)
            elif isinstance(event, Refreshed):
                figures["batchnorm"] = (seconds, bytes_sent)
            sent, since = traffic.sent(), perf_counter()
    return figures, memory


def where(cases: Sequence[dict[str, Any]], cores: int) -> str:
    """Return in words which processors the ranks have."""
    on_a_host = max(case["ranks_on_a_host"] for case in cases)
    if on_a_host == max(case["ranks"] for case in cases):
        return f"all ranks share {count(cores, 'core')}"
    return f"{count(on_a_host, 'rank')} on a host of {count(cores, 'core')}"


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Return the cases as a Markdown table."""
    columns = [f"{name}, {unit}" for name in PHASES for unit in ("s", "MB sent")]
    head = ["ranks", "parameters", "samples", *columns, "memory per rank, MiB"]
    rows = []
    for case in cases:
        cells = [f"{case['ranks']}", f"{case['parameters']:,}", f"{case['samples']:,}"]
        for phase in PHASES:
            seconds, sent = case["phases"][phase]["seconds"], case["phases"][phase]["bytes"]
            cells += [f"{seconds:.2f}", f"{sent / 1e6:.3g}"]
        rows.append((*cells, f"{case['peak_memory_mib']:.0f}"))
    return markdown_table(head, rows)
