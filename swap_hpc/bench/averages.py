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
from swap_hpc.recipe.inputs import Model
from swap_hpc.train import models

BATCHES, BATCH = 24, 256  # that the refresh takes, all ranks together


def average(world: Team, peers: ModuleType) -> list[Comparison]:
    """Compare the average of ResNet-50's 25.6 million parameters with a bare allreduce of them.

    Two more rows show what limits the first: the float64 allreduces alone, and the memory.
    """
    with node_of(world) as node:
        device = use_device(world, node, "auto")
    model = models.build(Model(name="torchvision:resnet50"), 1000, 3, world.rank).to(device.torch)
    parameters = sum(p.numel() for p in model.parameters())
    on_gpu = device.torch.type == "cuda"
    clock = Clock(world)
    host = torch.ones(parameters, pin_memory=on_gpu)
    on_device = torch.ones(parameters, device=device.torch) if on_gpu else None

    def ours() -> float:
        clock.start()
        average_weights_(model, world)
        return clock.seconds()

    def bare() -> float:
        clock.start()
        peers.bare_allreduce(world.comm, host, on_device)
        return clock.seconds()

    def floor() -> float:
        sums = np.ones(min(CHUNK, parameters))
        clock.start()
        for first in range(0, parameters, CHUNK):
            world.sum_(sums[: parameters - first])
        return clock.seconds()

    # What the first calls allocate, later ones use again: memory is compared after them.
    bare()
    ours()
    before = _largest_memory()
    ours_seconds, bare_seconds = alternately(ours, bare)
    grown = world.maximum((_largest_memory() - before) / 1024)[0]
    extra = _extra_memory(model, world)
    floor_seconds, bare_beside_floor = alternately(floor, bare, 3)

    size = f"{parameters / 1e6:.1f} million parameters, {world.size} ranks"
    bare_name = "bare MPI.Allreduce, float32" + (", and its copies" if on_gpu else "")
    chunk = CHUNK * 8 // 2**20  # MiB of float64
    return [
        Comparison(
            bench="average",
            what=f"average_weights_, {size}",
            peer=bare_name,
            unit="s",
            ours=ours_seconds,
            peers=bare_seconds,
            bar=1.5 if on_gpu else 2.5,
            at_most=True,
            note=f"in chunks of {chunk} MiB; {grown:.0f} MiB more in memory after six runs",
        ),
        Comparison(
            bench="average",
            what=f"its floor: float64 allreduces alone, {size}",
            peer=bare_name,
            unit="s",
            ours=floor_seconds,
            peers=bare_beside_floor,
        ),
        Comparison(
            bench="average",
            what=f"its extra memory at the peak, {size}",
            peer="a chunk of 64 MiB and its copy",
            unit="MiB",
            ours=[extra],
            peers=[128.0],
            bar=1.0,
            at_most=True,
        ),
    ]


def _largest_memory() -> int:
    """Return the largest resident memory that this process has had so far, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _extra_memory(model: nn.Module, world: Team) -> float:
    """Return the MiB on the host that an average needs beside the model; the largest rank's.

    It is the peak of what torch allocates and has not freed again.
    """
    copy = deepcopy(model)
    with torch.profiler.profile(profile_memory=True) as profile:
        average_weights_(copy, world)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()  # below zero where memory is freed
            peak = max(peak, held)
    return world.maximum(peak / 2**20)[0]


def batchnorm(world: Team, peers: ModuleType) -> list[Comparison]:
    """Compare the refresh, its batches shared by the ranks, with `update_bn` on one rank."""
    with node_of(world) as node:
        device = use_device(world, node, "auto")
    resnet9 = Model.model_validate({"name": "resnet9", "width": 16})
    model = models.build(resnet9, 10, 3, 0).to(device.torch)
    batches = torch.randn(BATCHES, BATCH, 3, 32, 32, device=device.torch).unbind()
    clock = Clock(world)

    def ours() -> float:
        clock.start()
        refresh_batchnorm_(model, batches[world.rank :: world.size], world)
        return clock.seconds()

    def on_one_rank() -> float:
        begin = time.perf_counter()
        peers.update_bn(batches, model)
        wait_for_gpu()
        return time.perf_counter() - begin

    def alone() -> float:
        return world.first_while_others_sleep(on_one_rank)

    ours_seconds, alone_seconds = alternately(ours, alone)
    return [
        Comparison(
            bench="batchnorm",
            what=f"refresh on {world.size} ranks, {BATCHES * BATCH:,} images",
            peer="torch's update_bn on one rank",
            unit="refreshes/s",
            ours=[1 / seconds for seconds in ours_seconds],
            peers=[1 / seconds for seconds in alone_seconds],
            bar=1.8,
        )
    ]
