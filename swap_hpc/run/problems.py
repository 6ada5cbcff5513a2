"""Problems of an environment, a launcher or the GPUs that `swap-hpc doctor` looks for.

Each function that looks for one returns a line with a hint, the same on all ranks, or None.
"""

import os
from time import perf_counter
from typing import Any

import numpy as np
import torch

from swap_hpc.errors import RunError
from swap_hpc.parallel.devices import Device
from swap_hpc.parallel.gradients import gradient_averaging
from swap_hpc.parallel.grid import Ranks
from swap_hpc.parallel.launcher import advice
from swap_hpc.parallel.mpi import host, launcher_mismatch, mpi_library
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.wording import first_few

ALLREDUCE_BYTES = 4 * 2**20  # of the allreduce that is timed


def allreduce_seconds(team: Team) -> float:
    """Return the slowest rank's median time of an allreduce of 4 MiB; collective.

    A team of one sends nothing: 0.
    """
    buffer = np.zeros(ALLREDUCE_BYTES // 8, dtype=np.float64)
    seconds = []
    for _ in range(6):
        team.barrier()
        begin = perf_counter()
        team.sum_(buffer)
        seconds.append(perf_counter() - begin)
    if team.size == 1:
        return 0.0
    median = sorted(seconds[1:])[2]  # of five: the first warms up
    return team.maximum(median)[0]


def can_average(built: dict[str, bool] | None, device: Device, shared: bool) -> bool:
    """Return whether Horovod can average gradients on a device.

    Args:
        built: which libraries Horovod was built with; None where it cannot be loaded.
        device: this rank's.
        shared: two ranks use one GPU: gradients go through host memory, without NCCL.
    """
    return built is not None and (built["nccl"] or shared or device.torch.type == "cpu")


def averaging_problem(world: Team, device: Device) -> str | None:
    """Check that a step averages the gradients of all ranks on their devices; collective."""
    layer = torch.nn.Linear(1000, 100).to(device.torch)  # a gradient of 400 kB
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    try:
        with gradient_averaging(layer, world, device) as average_gradients:
            # Every element's gradient is rank + 1: the mean over the ranks is (size + 1) / 2.
            (layer.weight.sum() * (world.rank + 1)).backward()
            average_gradients()
            optimizer.step()
    except RunError as error:  # raised on all ranks
        return str(error)
    moved = before - layer.weight.detach()
    error_here = (moved - (world.size + 1) / 2).abs().max().item()
    is_wrong = not error_here < 1e-3  # NaN is wrong, too
    if not world.any(is_wrong):
        return None
    everyones = world.gathered(is_wrong) or []
    wrong = [str(rank) for rank, each in enumerate(everyones) if each]
    ranks = world.broadcast(first_few(wrong, 16))
    return (
        f"gradients are not averaged on the devices of ranks {ranks}: a fault of Horovod, NCCL "
        "or the network; NCCL_DEBUG=INFO shows more"
    )


def installation_problems(facts: dict[str, Any], world: Team, shared: bool) -> list[str]:
    """Check the launcher, and the builds of Horovod, MPI and DALI.

    Args:
        facts: what `environment.json` holds.
        world: all ranks of the job.
        shared: two ranks use one GPU.

    Returns:
        One line per problem.
    """
    problems = []
    if mismatch := launcher_mismatch():
        problems.append(mismatch)
    horovod = facts["horovod"]
    if horovod is None:
        problems.append(
            "Horovod cannot be loaded: make setup builds it; "
            "without it only one rank can train a model"
        )
    elif torch.cuda.is_available() and not horovod["nccl"] and not shared:
        problems.append(
            "there are GPUs, but Horovod was built without NCCL: make setup HOROVOD_BUILD=nccl"
        )
    if facts["mpi"]["thread_level"] != "multiple":
        problems.append(
            "MPI does not give thread level multiple, which Horovod and mpi4py side by side need: "
            "use another build of MPI"
        )
    if not any(name.startswith("nvidia-dali") for name in facts["versions"]):
        problems.append("DALI is not installed: make setup")
    return problems


def placement_problem(world: Team, ranks: Ranks, node: Team) -> str | None:
    """Check that no group spans nodes although it would fit on one; collective."""
    any_is_spread = world.any(ranks.group.first_unlike(host().encode()) is not None)
    largest_node = world.maximum(node.size)[0]
    if not any_is_spread or largest_node < ranks.group.size:
        return None
    return (
        "a group spans nodes although a node has room for it: place consecutive ranks on one node "
        f"(srun --distribution=block, {advice(mpi_library()).neighbours})"
    )


def core_problem(world: Team, device: Device) -> str | None:
    """Check that no rank with a GPU is bound to one core, which its threads share; collective."""
    has_one_core = device.torch.type == "cuda" and len(os.sched_getaffinity(0)) == 1
    rank = world.first_where(has_one_core)
    if rank is None:
        return None
    return (
        f"rank {rank} has a GPU and one core: "
        "mpirun --bind-to none, or srun --cpus-per-task, gives it more"
    )
