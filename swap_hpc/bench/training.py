"""`step`, `loop`, `refine`: beside DistributedDataParallel, beside a bare loop, and a rank among others beside a rank alone."""

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
from swap_hpc.parallel.gradients import averaged_gradients
from swap_hpc.parallel.grid import node_of
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.loading import load_recipe
from swap_hpc.recipe.phase import PHASE_1, Phase, refinement_of
from swap_hpc.recipe.schema import LargeBatch, Model, Optimizer, Recipe, Refine
from swap_hpc.train import models
from swap_hpc.train.events import Epoch
from swap_hpc.train.fit import fit
from swap_hpc.train.job import Job
from swap_hpc.train.optimizers import build_optimizer

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
    """Steps of one model on one batch, again and again."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    steps: int
    world: Team
    device: Device
    peers: ModuleType

    @property
    def clock(self) -> Clock:
        return Clock(self.world)

    def ours(self) -> float:
        model = deepcopy(self.model)
        with averaged_gradients(
            model, build_optimizer(model, Optimizer()), self.world, self.device
        ) as optimizer:
            return self._speed(model, optimizer)

    def silent(self) -> float:
        """Every rank for itself."""
        model = deepcopy(self.model)
        return self._speed(model, build_optimizer(model, Optimizer()))

    def _speed(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        clock = self.clock
        for number in range(-2, self.steps):
            if number == 0:
                clock.start()
            optimizer.zero_grad()
            F.cross_entropy(model(self.images), self.labels).backward()
            optimizer.step()
        return self._images / clock.seconds()

    def peer(self) -> float:
        model = deepcopy(self.model)
        seconds = self.peers.ddp_steps(
            model,
            build_optimizer(model, Optimizer()),
            self.images,
            self.labels,
            self.steps,
            self.clock,
        )
        return self._images / float(seconds)

    @property
    def _images(self) -> int:
        return self.steps * self.world.size * len(self.labels)


def step(world: Team, peers: ModuleType) -> list[Comparison]:
    """A step of phase 1: two sizes of gradients."""
    with node_of(world) as node:
        device = use_device(world, node, "auto")
    backend = ddp_backend(device, world)
    comparisons = []
    for name, arguments, share, pixels, steps in (
        ("resnet9", {"width": 16}, 128, 32, 6),
        ("torchvision:resnet50", {}, 8, 64, 3),
    ):
        build = Model.model_validate({"name": name, **arguments})
        model = models.build(build, 10, 3, 0).to(device.torch).to(memory_format=torch.channels_last)
        images = torch.randn(share, 3, pixels, pixels, device=device.torch).contiguous(
            memory_format=torch.channels_last
        )
        labels = torch.randint(10, (share,), device=device.torch)
        case = _Step(model, images, labels, steps, world, device, peers)
        with peers.process_group(
            world.rank, world.size, world.broadcast(peers.store_file()), backend
        ):
            one, other = alternately(case.ours, case.peer)
            most, another = alternately(case.silent, case.peer, 3)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        what = f"{name}, {parameters:.1f} million gradients, batch {share} x {world.size}"
        peer = f"DistributedDataParallel ({backend})"
        comparisons.append(
            Comparison("step", f"{what}, Horovod", peer, "images/s", one, other, 1.0)
        )
        comparisons.append(
            Comparison(
                "step", f"its ceiling: {what}, nothing sent", peer, "images/s", most, another
            )
        )
    return comparisons


def ddp_backend(device: Device, world: Team) -> str:
    """What DistributedDataParallel sends gradients with. NCCL refuses two ranks on one GPU."""
    return "nccl" if device.torch.type == "cuda" and not device.is_shared(world) else "gloo"


def loop(world: Team, peers: ModuleType) -> list[Comparison]:
    """`fit()` and a bare loop over the same stream of batches."""
    job, model = _job("cifar10-cpu", world)

    def ours() -> float:
        return _fitted(job, deepcopy(model), Team.alone(), "large_batch")

    def bare() -> float:
        return _bare(job, model, job.recipe.large_batch, Key(0, Phase.LARGE_BATCH), peers)

    one, other = alternately(ours, bare)
    return [
        Comparison("loop", "fit()", "bare forward, backward, step", "images/s", one, other, 0.98)
    ]


def refine(world: Team, peers: ModuleType) -> list[Comparison]:
    """A rank's refinement while all ranks refine, and the same alone."""
    comparisons = []
    with node_of(world) as node:
        device = use_device(world, node, "auto")
    # ranks that share a GPU wait for each other there, whoever drives them: a bar would say nothing
    precisions: dict[str, float | None] = {"fp32": None if device.is_shared(world) else 0.97}
    if (
        torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):  # others imitate bfloat16, slowly
        precisions["bf16"] = None
    for precision, bar in precisions.items():
        job, model = _job("cifar10-cpu", world, f"precision={precision}", "data.samples=1280")

        def together(job: Job = job, model: nn.Module = model) -> float:
            world.barrier()
            mine = _fitted(job, deepcopy(model), Team.alone(), "refine", world.rank)
            return world.sums(mine)[0] / world.size

        def alone(job: Job = job, model: nn.Module = model) -> float:
            return world.first_while_others_sleep(
                lambda: _fitted(job, deepcopy(model), Team.alone(), "refine")
            )

        def bare(job: Job = job, model: nn.Module = model) -> float:
            return _bare(job, model, job.recipe.refine, Key(0, Phase.REFINE, world.rank), peers)

        def bare_together(bare: Callable[[], float] = bare) -> float:
            world.barrier()
            return world.sums(bare())[0] / world.size

        one, other = alternately(together, alone)
        most, another = alternately(bare_together, partial(world.first_while_others_sleep, bare), 3)
        what = f"{world.size} ranks refining, {precision}, {job.device.threads} thread each"
        comparisons.append(
            Comparison("refine", what, "one rank alone", "images/s per rank", one, other, bar)
        )
        what = f"its ceiling: {world.size} bare loops that know nothing of each other"
        comparisons.append(
            Comparison("refine", what, "one bare loop alone", "images/s per rank", most, another)
        )
    return comparisons


def _job(name: str, world: Team, *overrides: str) -> tuple[Job, nn.Module]:
    recipe: Recipe = load_recipe(name, (*SMALL, *overrides))
    with node_of(world) as node:
        device = use_device(world, node, "auto")
    dataset = load(recipe.data, world, device.threads)
    model = models.build(recipe.model, len(dataset.classes), dataset.channels, 0).to(device.torch)
    return Job(recipe, dataset, device), model


def _bare(
    job: Job, model: nn.Module, phase: LargeBatch | Refine, key: Key, peers: ModuleType
) -> float:
    """Images per second of the peer's loop on the same batches."""
    mine = deepcopy(model)
    optimizer = build_optimizer(mine, job.recipe.optimizer)
    begin = time.perf_counter()
    images = peers.bare_loop(
        mine, optimizer, job.training_batches(phase, key, Team.alone()), job.autocast
    )
    wait_for_gpu()
    return float(images / (time.perf_counter() - begin))


def _fitted(job: Job, model: nn.Module, team: Team, phase: str, group: int = 0) -> float:
    """Images per second of one epoch, batches in, evaluation out."""
    part = refinement_of(group) if phase == "refine" else PHASE_1
    epochs = [event for event in fit(model, job, part, team) if isinstance(event, Epoch)]
    return sum(each.images for each in epochs) / sum(each.train_seconds for each in epochs)
