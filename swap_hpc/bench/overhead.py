"""`overhead`: the host's share of a step beside the model's own work, in microseconds.

A GPU takes a few milliseconds for a step of ResNet-9, and is idle when the host is slower. Here the
model does nothing and the images have one pixel, so that what is left is the host's work.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from time import perf_counter
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from swap_hpc.bench.measure import Comparison, alternately
from swap_hpc.data.crops import cropped
from swap_hpc.data.dataset import with_statistics
from swap_hpc.data.sampling import Key, training_picks
from swap_hpc.data.seeding import seed_all
from swap_hpc.data.splits import Arrays
from swap_hpc.parallel.devices import choose_device
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import load_recipe
from swap_hpc.recipe.phase import PHASE_1, Phase
from swap_hpc.recipe.training import LargeBatch, Refine
from swap_hpc.train.events import Epoch
from swap_hpc.train.fit import fit
from swap_hpc.train.job import Batch, Job
from swap_hpc.train.optimizers import build_optimizer

BATCH, STEPS, EPOCHS = 512, 32, 4
FIELDS = (
    f"large_batch.batch_size={BATCH}",
    f"large_batch.epochs={EPOCHS}",
    "large_batch.learning_rate=0.1",
    "refine.epochs=0",
    "augment.pad=0",
    "augment.cutout=1",
    "evaluate.every=0",
    "checkpoint.epochs=0",
    "precision=bf16",
    "device=cpu",
)
KEY = Key(0, Phase.LARGE_BATCH)
MOST = 400.0  # microseconds


class Nothing(nn.Module):
    """(n, ...) -> (n, 10) logits that do not depend on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(10))

    def forward(self, images: Tensor) -> Tensor:
        return self.bias.expand(len(images), 10)


class AsOnGpu(Job):
    """A job on the CPU whose batches are made as on a GPU: by torch's operators, not by DALI's."""

    def training_batches(
        self, phase: LargeBatch | Refine, key: Key, team: Team, epoch: int = 0, step: int = 0
    ) -> Iterator[Batch]:
        train = self.dataset.train
        assert isinstance(train, Arrays)
        epochs = range(epoch, phase.epochs * phase.cycles)
        picks = training_picks(
            key, len(train), phase.batch_size, team.rank, team.size, epochs, step
        )
        return cropped(self.dataset, train, picks, self.recipe.augment, self.device.torch)


def overhead(world: Team, peers: ModuleType) -> list[Comparison]:
    """Compare a step of `fit()` with a bare loop's on one batch: forward, backward and step."""
    device = replace(choose_device(world, "cpu"), threads=1)
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (BATCH * STEPS, 1, 1, 3), dtype=np.uint8)
    labels = generator.integers(0, 10, BATCH * STEPS)
    test = Arrays(images[:10], labels[:10])
    dataset = with_statistics(Arrays(images, labels), test, tuple("0123456789"))
    recipe = load_recipe("cifar10", FIELDS)
    cases: list[tuple[str, Job, float | None]] = [
        ("crops as on a GPU", AsOnGpu(recipe, dataset, device), MOST),
        # DALI works on the pixels in the same threads, so that this row has no bar.
        ("crops by DALI, its work on the pixels too", Job(recipe, dataset, device), None),
    ]
    return [
        _compare(job, f"fit(), a step of {BATCH}, {name}", bar, peers) for name, job, bar in cases
    ]


def _compare(job: Job, what: str, bar: float | None, peers: ModuleType) -> Comparison:
    fitted, bare = alternately(lambda: _fitted(job), lambda: _bare(job, peers))
    next_batch, seeding = _batches(job), _seeding()
    rest = median(fitted) - median(bare) - (next_batch + seeding)
    parts = {"the next batch": next_batch, "seeding": seeding, "the steps' end": max(0.0, rest)}
    return Comparison(
        bench="overhead",
        what=what,
        peer="a bare loop on one batch",
        unit="us",
        ours=fitted,
        peers=bare,
        bar=bar,
        at_most=True,
        difference=True,
        note=", ".join(f"{part} {microseconds:.0f}" for part, microseconds in parts.items()),
    )


def _fitted(job: Job) -> float:
    """Return the microseconds of a step of `fit()`, the median of its epochs."""
    events = fit(Nothing(), job, PHASE_1, Team.alone())
    seconds = [event.train_seconds for event in events if isinstance(event, Epoch)]
    return 1e6 * median(seconds) / STEPS


def _bare(job: Job, peers: ModuleType) -> float:
    """Return the microseconds of a step of the bare loop."""
    model = Nothing()
    optimizer = build_optimizer(model, job.recipe.optimizer)
    batch = next(job.training_batches(job.recipe.large_batch, KEY, Team.alone()))
    return _microseconds(
        lambda: peers.bare_loop(model, optimizer, iter([batch] * STEPS), job.autocast), STEPS
    )


def _batches(job: Job) -> float:
    """Return the microseconds in which the next batch is made."""
    stream = job.training_batches(job.recipe.large_batch, KEY, Team.alone())
    # The first epoch warms up; five times half an epoch, which are measured, fit into the others.
    for _ in range(STEPS):
        next(stream)
    return _microseconds(lambda: [next(stream) for _ in range(STEPS // 2)], STEPS // 2)


def _seeding() -> float:
    """Return the microseconds in which the generators are seeded for a step."""

    def seed() -> None:
        for step in range(STEPS):
            seed_all(KEY.torch_seed(step, 0))

    return _microseconds(seed, STEPS)


def _microseconds(function: Callable[[], object], times: int) -> float:
    """Return the microseconds of one of the `times` steps of a call; the median of five calls."""
    seconds = []
    for _ in range(5):
        begin = perf_counter()
        function()
        seconds.append(perf_counter() - begin)
    return 1e6 * median(seconds) / times
