"""`average` and `batchnorm`: phase 3 beside a bare allreduce, and beside torch's `update_bn`."""

import resource
import time
from copy import deepcopy
from types import ModuleType

import numpy as np
import torch
from torch import nn

from swap_hpc.average.batchnorm import refresh_batchnorm_
from swap_hpc.average.uniform import CHUNK, average_weights_
from swap_hpc.bench.measure import Clock, Comparison, alternately, wait_for_gpu
from swap_hpc.parallel.devices import use_device
from swap_hpc.parallel.grid import node_of
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.schema import Model
from swap_hpc.train import models

BATCHES, BATCH = 24, 256  # of the refresh, together


def average(world: Team, peers: ModuleType) -> list[Comparison]:
    """25.6 million parameters, averaged over all ranks."""
    with node_of(world) as node:
        device = use_device(world, node, "auto")
    model = models.build(Model(name="torchvision:resnet50"), 1000, 3, world.rank).to(device.torch)
    parameters = sum(p.numel() for p in model.parameters())
    on_gpu, clock = device.torch.type == "cuda", Clock(world)
    host = torch.ones(parameters, pin_memory=on_gpu)
    there = torch.ones(parameters, device=device.torch) if on_gpu else None

    def ours() -> float:
        clock.start()
        average_weights_(model, world)
        return clock.seconds()

    def bare() -> float:
        clock.start()
        peers.bare_allreduce(world.comm, host, there)
        return clock.seconds()

    def floor() -> float:
        sums = np.ones(min(CHUNK, parameters))
        clock.start()
        for first in range(0, parameters, CHUNK):
            world.sum_(sums[: parameters - first])
        return clock.seconds()

    bare(), ours()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one, other = alternately(ours, bare)
    grown = world.maximum((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)[0]
    size = f"{parameters / 1e6:.1f} million parameters, {world.size} ranks"
    peer = "bare MPI.Allreduce, float32" + (", and its copies" if on_gpu else "")
    note = f"in chunks of {CHUNK * 8 // 2**20} MiB; {grown:.0f} MiB more in memory after six runs"
    room = [_extra_memory(model, world)]
    return [
        Comparison(
            "average",
            f"average_weights_, {size}",
            peer,
            "s",
            one,
            other,
            1.5 if on_gpu else 2.5,
            at_most=True,
            note=note,
        ),
        Comparison(
            "average",
            f"its floor: float64 allreduces alone, {size}",
            peer,
            "s",
            *alternately(floor, bare, 3),
        ),
        Comparison(
            "average",
            f"its extra memory at the peak, {size}",
            "a chunk of 64 MiB and its copy",
            "MiB",
            room,
            [128.0],
            1.0,
            True,
        ),
    ]


def _extra_memory(model: nn.Module, world: Team) -> float:
    """MiB that an average takes beside the model: the peak of what torch allocates, the largest rank's."""
    copy = deepcopy(model)
    with torch.profiler.profile(profile_memory=True) as profile:
        average_weights_(copy, world)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return world.maximum(peak / 2**20)[0]


def batchnorm(world: Team, peers: ModuleType) -> list[Comparison]:
    """The statistics of the same batches, shared out to the ranks or all on one."""
    with node_of(world) as node:
        device = use_device(world, node, "auto")
    model = models.build(Model(name="resnet9", width=16), 10, 3, 0).to(device.torch)  # type: ignore[call-arg]
    batches = torch.randn(BATCHES, BATCH, 3, 32, 32, device=device.torch).unbind()
    clock = Clock(world)

    def ours() -> float:
        clock.start()
        refresh_batchnorm_(model, batches[world.rank :: world.size], world)
        return clock.seconds()

    def alone() -> float:
        def one_rank() -> float:
            begin = time.perf_counter()
            peers.update_bn(batches, model)
            wait_for_gpu()
            return time.perf_counter() - begin

        return world.first_while_others_sleep(one_rank)

    one, other = alternately(ours, alone)
    faster = [1 / seconds for seconds in one], [1 / seconds for seconds in other]
    what = f"refresh on {world.size} ranks, {BATCHES * BATCH:,} images"
    return [
        Comparison(
            "batchnorm", what, "torch's update_bn on one rank", "refreshes/s", *faster, bar=1.8
        )
    ]
