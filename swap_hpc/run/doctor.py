"""What a person asks first when a job fails on a cluster."""

import os
from time import perf_counter
from typing import Any

import numpy as np
import torch

from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.devices import Device, use_device
from swap_hpc.parallel.gradients import averaged_gradients
from swap_hpc.parallel.grid import Ranks, grid, node_of
from swap_hpc.parallel.launcher import advice, launched
from swap_hpc.parallel.mpi import host, launcher_mismatch, mpi_library
from swap_hpc.parallel.teams import Team
from swap_hpc.run.environment import environment

REDUCED = 2**20  # float32 elements of the timed allreduce: 4 MiB


def _place(rank: dict[str, Any]) -> str:
    seen = rank["cuda_visible_devices"]
    told = "" if seen is None else f", CUDA_VISIBLE_DEVICES={seen}"
    return f"rank {rank['rank']} -> {rank['host']}, local rank {rank['local_rank']} -> {rank['device']}, {rank['threads']} threads{told}"


def report(world: Team, groups: int) -> list[str]:
    """Lines for a person, alike on all ranks; ends with what is wrong, or that nothing was found."""
    with node_of(world) as node, grid(world, groups) as ranks:
        device, unusable = _device(world, node)
        facts = environment(world, node, device)
        nodes = world.allgather(host())
        timed = {
            name: _seconds_of_allreduce(team)
            for name, team in (("world", world), ("group", ranks.group), ("peers", ranks.peers))
        }
        shared = device.is_shared(world)
        tries = world.size > 1 and not unusable and can_average(facts["horovod"], device, shared)
        unaveraged = _averaging_problem(world, device) if tries else None
        spans = world.any(len(set(ranks.group.allgather(host()))) > 1)
        problems = [line for line in (unusable, unaveraged) if line] + _problems(
            world, ranks, node, facts, spans, shared
        )
        problems += crowding(world, device)
    lines = [f"swap_hpc {facts['swap_hpc']}, Python {facts['python']}, {facts['cpu']}"]
    lines.append(
        "packages: " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    )
    lines.append(
        f"MPI: {facts['mpi']['library']} ({facts['mpi']['file'] or 'file unknown'}), thread level {facts['mpi']['thread_level']}"
    )
    told = launched()
    lines.append(
        f"launcher: {f'{told.by}, {told.size} ranks' if told else 'none (one process, started alone)'}"
    )
    built = facts["horovod"]
    lines.append(
        "Horovod: "
        + (
            ", ".join(f"{k} {'yes' if v else 'no'}" for k, v in built.items())
            if built
            else "not installed"
        )
    )
    lines.append(
        f"CUDA of torch: {facts['cuda']}; NCCL: {facts['nccl'] or 'not in use (no GPU)'}; GPUs seen by rank 0: {torch.cuda.device_count()}"
    )
    lines += [_place(rank) for rank in facts["ranks"]]
    lines.append(f"grid: {world.size} ranks on {len(set(nodes))} nodes, {groups} groups")
    if tries and not unaveraged:
        lines.append("a step's gradients, averaged by Horovod over world: right on all ranks")
    lines += [
        f"allreduce of 4 MiB over {name}: {1e3 * seconds:.2f} ms" for name, seconds in timed.items()
    ]
    return lines + ([f"PROBLEM: {problem}" for problem in problems] or ["no problem found"])


def _device(world: Team, node: Team) -> tuple[Device, str | None]:
    """This rank's device, alike in kind on all ranks; the CPU, and what is wrong in a line, where torch cannot use what it finds."""
    try:
        return use_device(world, node, "auto"), None
    except UserError as error:
        return use_device(world, node, "cpu"), str(error)


def can_average(built: dict[str, bool] | None, device: Device, shared: bool) -> bool:
    """Tell whether a Horovod was built that can be tried on this device. `shared`: as of `check_horovod`."""
    return built is not None and (built["nccl"] or shared or device.torch.type == "cpu")


def _averaging_problem(world: Team, device: Device) -> str | None:
    """A line where a step on these devices does not average the gradients of all ranks. Collective over `world`."""
    layer = torch.nn.Linear(1000, 100).to(device.torch)  # 400 kB
    before = layer.weight.detach().clone()
    try:
        with averaged_gradients(
            layer, torch.optim.SGD(layer.parameters(), lr=1.0), world, device
        ) as optimizer:
            (layer.weight.sum() * (world.rank + 1)).backward()
            optimizer.step()
    except RunError as error:  # on all ranks alike
        return str(error)
    off = (before - layer.weight.detach() - (world.size + 1) / 2).abs().max().item()
    wrong = [rank for rank, each in enumerate(world.allgather(off)) if not each < 1e-3]
    if not wrong:
        return None
    ranks = ", ".join(map(str, wrong))
    return f"gradients are not averaged on the devices of ranks {ranks}: a fault of Horovod, NCCL or the network; NCCL_DEBUG=INFO tells more"


def crowding(world: Team, device: Device) -> list[str]:
    """A line where a rank with a GPU may use one core only, on which its threads then wait for each other."""
    alone = world.allgather(device.torch.type == "cuda" and len(os.sched_getaffinity(0)) == 1)
    if not any(alone):
        return []
    return [
        f"rank {alone.index(True)} has a GPU and one core: mpirun --bind-to none, or srun --cpus-per-task, gives it more"
    ]


def _seconds_of_allreduce(team: Team) -> float:
    """The slowest rank's median of five, after one to warm up; 0 for a team of one, which sends nothing."""
    times = []
    buffer = np.zeros(REDUCED // 2, dtype=np.float64)
    for _ in range(6):
        team.barrier()
        begin = perf_counter()
        team.sum_(buffer)
        times.append(perf_counter() - begin)
    return team.maximum(sorted(times[1:])[2])[0] if team.size > 1 else 0.0


def _problems(
    world: Team, ranks: Ranks, node: Team, facts: dict[str, Any], spans: bool, shared: bool
) -> list[str]:
    problems = [line] if (line := launcher_mismatch(world)) else []
    if facts["horovod"] is None:
        problems.append(
            "Horovod cannot be loaded: make setup builds it; without it only one rank can train a model"
        )
    elif torch.cuda.is_available() and not facts["horovod"]["nccl"] and not shared:
        problems.append(
            "there are GPUs, but Horovod was built without NCCL: make setup HOROVOD_BUILD=nccl"
        )
    if facts["mpi"]["thread_level"] != "multiple":
        problems.append(
            "MPI does not give thread level multiple, which Horovod and mpi4py side by side need: use another build of MPI"
        )
    if not any(name.startswith("nvidia-dali") for name in facts["versions"]):
        problems.append("DALI is not installed: make setup")
    if spans and world.maximum(node.size)[0] >= ranks.group.size:
        problems.append(
            "a group spans nodes although a node has room for it: "
            f"place consecutive ranks on one node (srun --distribution=block, {advice(mpi_library()).neighbours})"
        )
    return problems
