"""Which device and how many threads each rank of a node uses."""

import os
import re
from dataclasses import dataclass
from typing import Literal

import torch

from swap_hpc.errors import UserError
from swap_hpc.ranks import Team


@dataclass(frozen=True)
class Device:
    torch: torch.device
    threads: int  # of the CPU, for this rank
    uuid: str | None = None  # of the GPU

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch) if self.torch.type == "cuda" else "cpu"

    def is_shared(self, team: Team) -> bool:
        """Whether two ranks of `team` use one GPU: NCCL refuses that, so their gradients go through host memory."""
        uuids = [uuid for uuid in team.allgather(self.uuid) if uuid]
        return len(set(uuids)) < len(uuids)


def choose_device(node: Team, wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """This rank's device: the GPU at its local rank, round-robin where there are more ranks than GPUs; else the CPU.

    Right where a launcher shows each rank one GPU, and where it shows all of them. Raises UserError, on all ranks of the
    node, where a GPU is asked for and there is none, and where OMP_NUM_THREADS is no number.
    """
    cores = tuple(sorted(os.sched_getaffinity(0)))
    of_all = node.allgather(cores)
    threads = node.agree(lambda: _threads(cores, of_all))
    gpu = node.agree(lambda: _gpu(node.rank, wanted))
    if gpu is None:
        return Device(torch.device("cpu"), threads)
    index, uuid = gpu
    return Device(torch.device("cuda", index), threads, uuid)


def _gpu(local_rank: int, wanted: Literal["auto", "cpu", "cuda"]) -> tuple[int, str] | None:
    """Index and UUID of a GPU."""
    visible = torch.cuda.device_count() if wanted != "cpu" else 0
    if visible:
        index = local_rank % visible
        return index, str(torch.cuda.get_device_properties(index).uuid)
    if wanted == "cuda":
        raise UserError('device = "cuda", but torch sees no GPU on this host: --set device=cpu, or ask the launcher for GPUs')
    return None


def _threads(mine: tuple[int, ...], of_all: list[tuple[int, ...]]) -> int:
    """OMP_NUM_THREADS where it is set; else the cores that this rank may use, shared out where ranks may use the same ones.

    Of OpenMP's list, a number for each level of nested loops, the first. Raises UserError for what is no number of threads.
    """
    told = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not told:
        return max(1, len(mine) // of_all.count(mine))
    first = told.split(",")[0].strip()
    if not re.fullmatch("0*[1-9][0-9]{0,3}", first):
        raise UserError(f"OMP_NUM_THREADS={told} is no number of threads: export OMP_NUM_THREADS=1, say, or unset it")
    return int(first)
