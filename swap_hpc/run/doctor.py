"""`swap-hpc doctor`: what to look at first when a job fails on a cluster, and problems found."""

from dataclasses import dataclass
from typing import Any

import torch

from swap_hpc.errors import UserError
from swap_hpc.parallel.devices import Device, use_device
from swap_hpc.parallel.grid import grid, node_of
from swap_hpc.parallel.launcher import launched
from swap_hpc.parallel.teams import Team
from swap_hpc.recipe.wording import count
from swap_hpc.run.environment import environment
from swap_hpc.run.problems import (
    allreduce_seconds,
    averaging_problem,
    can_average,
    core_problem,
    installation_problems,
    placement_problem,
)


@dataclass(frozen=True)
class Diagnosis:
    """What all ranks found out together; the same on all of them, but for the facts."""

    facts: dict[str, Any]  # what `environment.json` holds; the places of all ranks on the first
    ranks: int
    nodes: int
    groups: int
    averages: bool  # a step was tried, and its gradients were averaged right
    seconds: dict[str, float]  # communicator -> of an allreduce of 4 MiB, by its slowest rank
    problems: list[str]  # one line each


def report(world: Team, groups: int) -> list[str]:
    """Examine the ranks of a job, and return lines for a person; collective.

    Args:
        world: all ranks of the job.
        groups: to divide them into.

    Returns:
        The lines; the last ones are the problems, if there are any. Those that name each rank's
        place are there on the first rank alone.

    Raises:
        UserError: on all ranks, they cannot share the groups.
    """
    return _lines(_examine(world, groups))


def _examine(world: Team, groups: int) -> Diagnosis:
    with node_of(world) as node, grid(world, groups) as ranks:
        device, device_problem = _device(world, node)
        facts = environment(world, node, device)
        nodes = round(world.sums(1 / node.size)[0])
        teams = {"world": world, "group": ranks.group, "peers": ranks.peers}
        seconds = {name: allreduce_seconds(team) for name, team in teams.items()}
        shared = device.is_shared(world)
        horovod = facts["horovod"]
        tries = world.size > 1 and not device_problem and can_average(horovod, device, shared)
        step_problem = averaging_problem(world, device) if tries else None
        found = [
            device_problem,
            step_problem,
            *installation_problems(facts, world, shared),
            placement_problem(world, ranks, node),
            core_problem(world, device),
        ]
    return Diagnosis(
        facts=facts,
        ranks=world.size,
        nodes=nodes,
        groups=groups,
        averages=tries and not step_problem,
        seconds=seconds,
        problems=[problem for problem in found if problem],
    )


def _device(world: Team, node: Team) -> tuple[Device, str | None]:
    """Return this rank's device, of one kind on all ranks, and a problem with it.

    Where torch cannot use the devices that it finds, that is the problem, and the CPU is used.
    """
    try:
        return use_device(world, node, "auto"), None
    except UserError as error:
        return use_device(world, node, "cpu"), str(error)


def _lines(diagnosis: Diagnosis) -> list[str]:
    facts = diagnosis.facts
    mpi = facts["mpi"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    ranks = count(diagnosis.ranks, "rank")
    nodes, groups = count(diagnosis.nodes, "node"), count(diagnosis.groups, "group")
    lines = [
        f"swap_hpc {facts['swap_hpc']}, Python {facts['python']}, {facts['cpu']}",
        f"packages: {versions}",
        f"MPI: {mpi['library']} ({mpi['file'] or 'file unknown'}), "
        f"thread level {mpi['thread_level']}",
        f"launcher: {_launcher()}",
        f"Horovod: {_horovod(facts['horovod'])}",
        f"CUDA of torch: {facts['cuda']}; NCCL: {facts['nccl'] or 'not in use (no GPU)'}; "
        f"GPUs seen by rank 0: {torch.cuda.device_count()}",
        *map(_place, facts["ranks"]),
        f"grid: {ranks} on {nodes}, {groups}",
    ]
    if diagnosis.averages:
        lines.append("a step's gradients, averaged by Horovod over world: right on all ranks")
    for name, seconds in diagnosis.seconds.items():
        lines.append(f"allreduce of 4 MiB over {name}: {1e3 * seconds:.2f} ms")
    problems = [f"PROBLEM: {problem}" for problem in diagnosis.problems]
    return lines + (problems or ["no problem found"])


def _launcher() -> str:
    found = launched()
    if found is None:
        return "none (one process, started alone)"
    return f"{found.by}, {count(found.size, 'rank')}"


def _horovod(built: dict[str, bool] | None) -> str:
    if built is None:
        return "not installed"
    return ", ".join(f"{library} {'yes' if has else 'no'}" for library, has in built.items())


def _place(rank: dict[str, Any]) -> str:
    """Return the line of one rank: its host, device and threads."""
    visible = rank["cuda_visible_devices"]
    variable = "" if visible is None else f", CUDA_VISIBLE_DEVICES={visible}"
    return (
        f"rank {rank['rank']} -> {rank['host']}, local rank {rank['local_rank']} -> "
        f"{rank['device']}, {count(rank['threads'], 'thread')}{variable}"
    )
