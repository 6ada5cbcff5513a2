"""Which device and how many threads each rank of a node uses."""

import os
from dataclasses import dataclass
from typing import Literal

import torch

from swap_hpc.errors import UserError
from swap_hpc.ranks import Team


@dataclass(frozen=True)
class Device:
    torch: torch.device
    shared: bool  # another rank uses this very GPU: NCCL refuses that, so gradients go through host memory
    threads: int  # of the CPU, for this rank

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch) if self.torch.type == "cuda" else "cpu"


def choose_device(node: Team, wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """This rank's device: the GPU at its local rank, round-robin where there are more ranks than GPUs; else the CPU.

    Right where a launcher shows each rank one GPU, and where it shows all of them. Raises UserError where a GPU is asked
    for and there is none.
    """
    visible = torch.cuda.device_count() if wanted != "cpu" else 0
    index = node.rank % visible if visible else None
    uuid = str(torch.cuda.get_device_properties(index).uuid) if index is not None else None
    cores = tuple(sorted(os.sched_getaffinity(0)))
    neighbours = node.allgather((uuid, cores))
    threads = _threads(cores, [others for _, others in neighbours])
    if index is not None:
        shared = [other for other, _ in neighbours].count(uuid) > 1
        return Device(torch.device("cuda", index), shared, threads)
    if wanted == "cuda":
        raise UserError('device = "cuda", but torch sees no GPU on this host: --set device=cpu, or ask the launcher for GPUs')
    return Device(torch.device("cpu"), shared=False, threads=threads)


def _threads(mine: tuple[int, ...], of_all: list[tuple[int, ...]]) -> int:
    """OMP_NUM_THREADS where it is set; else the cores that this rank may use, shared out where ranks may use the same ones."""
    if "OMP_NUM_THREADS" in os.environ:
        return int(os.environ["OMP_NUM_THREADS"])
    return max(1, len(mine) // of_all.count(mine))
