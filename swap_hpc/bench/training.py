"""`step`, `loop` and `refine`: training beside what does the same work with less.

The alternatives are DistributedDataParallel, a bare loop, and a rank alone.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swap_hpc.bench.measure import Clock, Comparison, alternately, wait_for_gpu
from swap_hpc.data import load
from swap_hpc.data.sampling import Key
from swap_hpc.parallel.devices import Device, use_device
from swap_hpc.parallel.gradients import gradient_averaging
from swap_hpc.parallel.grid import node_of
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.inputs import Model
from swap_hpc.recipe.loading import load_recipe
from swap_hpc.recipe.optimizer import Optimizer
from swap_hpc.recipe.phase import PHASE_1, Part, Phase, refinement_of
from swap_hpc.recipe.schema import Recipe
from swap_hpc.recipe.training import LargeBatch, Refine
from swap_hpc.recipe.wording import count
from swap_hpc.train import models
from swap_hpc.train.events import Epoch
from swap_hpc.train.fit import fit
from swap_hpc.train.job import Job
from swap_hpc.train.optimizers import build_optimizer

# Overrides of a recipe, for an epoch of a few seconds.
SMALL = (
    "data.name=synthetic",
    "data.samples=4096",
    "precision=fp32",
    "evaluate.every=0",
    "large_batch.epochs=1",
    "refine.epochs=1",
)


@dataclass(frozen=True)
class _Step:
    """Steps of one model on one batch, again and again.

    Speeds are the images per second of all ranks together.
    """

    model: nn.Module
    images: Tensor  # (n, C, H, W), this rank's share of the batch
    labels: Tensor  # (n,)
    steps: int
    world: Team
    device: Device
    peers: ModuleType

    def ours(self) -> float:
        """Return the speed with Horovod."""
        model = deepcopy(self.model)
        optimizer = build_optimizer(model, Optimizer())
        with gradient_averaging(model, self.world, self.device) as average_gradients:
            return self._speed(model, optimizer, average_gradients)

    def silent(self) -> float:
        """Return the speed of ranks that send nothing, each with a model of its own."""
        model = deepcopy(self.model)
        return self._speed(model, build_optimizer(model, Optimizer()), lambda: None)

    def peer(self) -> float:
        """Return the speed with DistributedDataParallel."""
        model = deepcopy(self.model)
        optimizer = build_optimizer(model, Optimizer())
        clock = Clock(self.world)
        seconds = self.peers.ddp_steps(
            model, optimizer, self.images, self.labels, self.steps, clock
        )
        return self._images / float(seconds)

    def _speed(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average_gradients: Callable[[], None],
    ) -> float:
        clock = Clock(self.world)
        for number in range(-2, self.steps):  # two steps to warm up
            if number == 0:
                clock.start()
            optimizer.zero_grad()
            F.cross_entropy(model(self.images), self.labels).backward()
            average_gradients()
            optimizer.step()
        return self._images / clock.seconds()

    @property
    def _images(self) -> int:
        return self.steps * self.world.size * len(self.labels)


def step(world: Team, peers: ModuleType) -> list[Comparison]:
    """Compare a step of phase 1 with DistributedDataParallel's, for two sizes of gradients."""
    with node_of(world) as node:
        device = use_device(world, node, "auto")
    resnet9 = Model.model_validate({"name": "resnet9", "width": 16})
    resnet50 = Model.model_validate({"name": "torchvision:resnet50"})
    return [
        *_compare_steps(resnet9, 128, 32, 6, world, device, peers),
        *_compare_steps(resnet50, 8, 64, 3, world, device, peers),
    ]


def _compare_steps(
    build: Model,
    share: int,
    pixels: int,
    steps: int,
    world: Team,
    device: Device,
    peers: ModuleType,
) -> list[Comparison]:
    """Compare steps of one model; a second row shows the limit, where nothing is sent.

    Args:
        build: the model.
        share: images per rank and step.
        pixels: the side of an image.
        steps: that are measured together.
        world: all ranks.
        device: this rank's.
        peers: the alternatives.
    """
    model = models.build(build, 10, 3, 0).to(device.torch).to(memory_format=torch.channels_last)
    images = torch.randn(share, 3, pixels, pixels, device=device.torch)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (share,), device=device.torch)
    case = _Step(model, images, labels, steps, world, device, peers)
    backend = ddp_backend(device, world)
    store = world.broadcast(peers.store_file())
    with peers.process_group(world.rank, world.size, store, backend):
        with_horovod = alternately(case.ours, case.peer)
        silent = alternately(case.silent, case.peer, 3)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    what = f"{build.name}, {millions:.1f} million gradients, batch {share} x {world.size}"
    peer = f"DistributedDataParallel ({backend})"
    ceiling = f"its ceiling: {what}, nothing sent"
    return [
        Comparison("step", f"{what}, Horovod", peer, "images/s", *with_horovod, bar=1.0),
        Comparison("step", ceiling, peer, "images/s", *silent),
    ]


def ddp_backend(device: Device, world: Team) -> str:
    """Return what DistributedDataParallel sends gradients with.

    NCCL refuses two ranks on one GPU.
    """
    return "nccl" if device.torch.type == "cuda" and not device.is_shared(world) else "gloo"


def loop(world: Team, peers: ModuleType) -> list[Comparison]:
    """Compare `fit()` with a bare loop over the same stream of batches."""
    job, model = _job("cifar10-cpu", world)

    def ours() -> float:
        return _fitted(job, deepcopy(model), PHASE_1)

    def bare() -> float:
        return _bare(job, model, job.recipe.large_batch, Key(0, Phase.LARGE_BATCH), peers)

    pairs = alternately(ours, bare)
    return [
        Comparison("loop", "fit()", "bare forward, backward, step", "images/s", *pairs, bar=0.98)
    ]


def refine(world: Team, peers: ModuleType) -> list[Comparison]:
    """Compare a rank's refinement while all ranks refine with that of a rank alone."""
    with node_of(world) as node:
        device = use_device(world, node, "auto")
    # Ranks that share a GPU wait for each other there, whatever drives them: no bar.
    bar = None if device.is_shared(world) else 0.97
    comparisons = _compare_refinement("fp32", bar, world, peers)
    # Processors without bfloat16 imitate it, slowly.
    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        comparisons += _compare_refinement("bf16", None, world, peers)
    return comparisons


def _compare_refinement(
    precision: str, bar: float | None, world: Team, peers: ModuleType
) -> list[Comparison]:
    """Compare refinement in one precision; a second row shows the limit, two bare loops."""
    job, model = _job("cifar10-cpu", world, f"precision={precision}", "data.samples=1280")

    def ours() -> float:
        return _fitted(job, deepcopy(model), refinement_of(world.rank))

    def bare() -> float:
        return _bare(job, model, job.recipe.refine, Key(0, Phase.REFINE, world.rank), peers)

    def together(measure: Callable[[], float]) -> float:
        world.barrier()
        return world.sums(measure())[0] / world.size

    def alone(measure: Callable[[], float]) -> float:
        return world.first_while_others_sleep(measure)

    pairs = alternately(partial(together, ours), partial(alone, ours))
    bare_pairs = alternately(partial(together, bare), partial(alone, bare), 3)
    unit = "images/s per rank"
    what = f"{world.size} ranks refining, {precision}, {count(job.device.threads, 'thread')} each"
    ceiling = f"its ceiling: {world.size} bare loops that know nothing of each other"
    return [
        Comparison("refine", what, "one rank alone", unit, *pairs, bar=bar),
        Comparison("refine", ceiling, "one bare loop alone", unit, *bare_pairs),
    ]


def _job(name: str, world: Team, *overrides: str) -> tuple[Job, nn.Module]:
    """Return a job of a shipped recipe on synthetic images, and its model."""
    recipe: Recipe = load_recipe(name, (*SMALL, *overrides))
    with node_of(world) as node:
        device = use_device(world, node, "auto")
    dataset = load(recipe.data, world, device.threads)
    model = models.build(recipe.model, len(dataset.classes), dataset.channels, 0).to(device.torch)
    return Job(recipe, dataset, device), model


def _bare(
    job: Job, model: nn.Module, phase: LargeBatch | Refine, key: Key, peers: ModuleType
) -> float:
    """Return the images per second of the bare loop on a phase's batches."""
    mine = deepcopy(model)
    optimizer = build_optimizer(mine, job.recipe.optimizer)
    begin = time.perf_counter()
    batches = job.training_batches(phase, key, Team.alone())
    images = peers.bare_loop(mine, optimizer, batches, job.autocast)
    wait_for_gpu()
    return float(images / (time.perf_counter() - begin))


def _fitted(job: Job, model: nn.Module, part: Part) -> float:
    """Return the images per second of `fit()` on one rank, with its batches but no evaluation."""
    epochs = [event for event in fit(model, job, part, Team.alone()) if isinstance(event, Epoch)]
    return sum(each.images for each in epochs) / sum(each.train_seconds for each in epochs)
