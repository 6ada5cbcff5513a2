"""The device and the threads of each rank of a node, and whether torch can use that device."""

import os
import re
import resource
from dataclasses import dataclass
from typing import Literal

import torch

from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team

Wanted = Literal["auto", "cpu", "cuda"]


Capability = tuple[int, int]  # a GPU's compute capability, (major, minor)

BF16: Capability = (8, 0)  # older GPUs imitate it, slowly


DRIVERS = {
    "12": 525,
    "13": 580,
}  # the oldest driver for CUDA's major version; NVIDIA, "CUDA Compatibility"


@dataclass(frozen=True)
class Device:
    """A rank's device."""

    torch: torch.device
    threads: int  # of the CPU, for this rank
    uuid: str | None = None  # of the GPU
    capability: Capability | None = None  # of the GPU

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch) if self.torch.type == "cuda" else "cpu"

    def is_shared(self, team: Team) -> bool:
        """Whether two ranks of `team` use one GPU: NCCL refuses that, so their gradients go through host memory."""
        uuids = [uuid for uuid in team.allgather(self.uuid) if uuid]
        return len(set(uuids)) < len(uuids)

    def peak_memory(self) -> "Memory":
        """The most memory that this process has had since it began."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.torch.type != "cuda":
            return Memory(host)
        allocated, reserved = (
            torch.cuda.max_memory_allocated(self.torch),
            torch.cuda.max_memory_reserved(self.torch),
        )
        return Memory(host, allocated, reserved)


@dataclass(frozen=True)
class Memory:
    """The peaks of one process, or the largest ones of several, in bytes.

    On the GPU only what torch takes is counted: not DALI's and NCCL's buffers, nor CUDA's own few hundred MiB.
    """

    host: int  # resident
    gpu_allocated: int = 0  # in tensors; 0 without a GPU
    gpu_reserved: int = (
        0  # taken from the GPU, tensors and what is kept for later ones; 0 without a GPU
    )


def use_device(world: Team, node: Team, wanted: Wanted) -> Device:
    """Makes the device of `choose_device` this process's: torch's current one, with as many threads as it has.

    Collective over `world`; `node` holds its ranks on this node. Raises UserError, on all ranks of `world`, as
    `choose_device` does, and where some ranks have a GPU and others none.
    """
    device = world.agree(lambda: choose_device(node, wanted))
    kinds = world.allgather(device.torch.type)
    if len(set(kinds)) > 1:
        raise UserError(
            f"rank {kinds.index('cpu')} sees no GPU, others do: ask the launcher for a GPU per rank, or --set device=cpu"
        )
    torch.set_num_threads(device.threads)
    world.agree(lambda: _set(device))
    return device


def _set(device: Device) -> None:
    if device.torch.type != "cuda":
        return
    try:
        torch.cuda.set_device(device.torch)
    except RuntimeError as error:  # another process may have the GPU to itself
        raise UserError(_unusable(str(error))) from None


def choose_device(node: Team, wanted: Wanted) -> Device:
    """This rank's device: the GPU at its local rank, round-robin where there are more ranks than GPUs; else the CPU.

    Right where a launcher shows each rank one GPU, and where it shows all of them. Raises UserError, on all ranks of the
    node, where a GPU is asked for and there is none, where torch cannot use the GPU or its driver, and where
    OMP_NUM_THREADS is no number.
    """
    cores = tuple(sorted(os.sched_getaffinity(0)))
    of_all = node.allgather(cores)
    threads = node.agree(lambda: _threads(cores, of_all))
    gpu = node.agree(lambda: _gpu(node.rank, wanted, threads))
    return gpu if gpu else Device(torch.device("cpu"), threads)


def _gpu(local_rank: int, wanted: Wanted, threads: int) -> Device | None:
    visible = (
        torch.cuda.device_count() if wanted != "cpu" else 0
    )  # also counts GPUs that torch cannot use
    if not visible:
        if wanted == "cuda":
            raise UserError(
                'device = "cuda", but torch sees no GPU on this host: --set device=cpu, or ask the launcher for GPUs'
            )
        return None
    index = local_rank % visible
    try:
        found = torch.cuda.get_device_properties(index)
    except (RuntimeError, AssertionError) as error:
        raise UserError(_unusable(str(error))) from None
    capability = (found.major, found.minor)
    architectures = torch.cuda.get_arch_list()
    if not serves(architectures, capability):
        raise UserError(_unserved(found.name, capability, architectures))
    return Device(torch.device("cuda", index), threads, str(found.uuid), capability)


def serves(architectures: list[str], capability: Capability) -> bool:
    """Tell whether code for these architectures runs on a GPU of that capability.

    `architectures`: as `torch.cuda.get_arch_list()` names them. Machine code ("sm_80") runs on its own major version from
    its minor version on, with a letter ("sm_90a") on its own capability alone; PTX ("compute_80") on all newer GPUs, too.
    """
    for architecture in architectures:
        if not (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)):
            continue
        kind, letter, built = found[1], found[4], (int(found[2]), int(found[3]))
        if built == capability:
            return True
        if not letter and built < capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return not architectures  # torch does not tell


def _unusable(error: str) -> str:
    """What torch says of a GPU that it sees and cannot use, in one line with a hint."""
    cuda = (torch.version.cuda or "").partition(".")[0]
    if "driver" in error and "too old" in error:
        other = ", make setup CUDA=12," if cuda == "13" else ""
        return (
            f"the GPU's driver{_driver()} is too old for CUDA {cuda}, which needs {DRIVERS.get(cuda, 'a newer one')} or newer: "
            f"update it{other} or --set device=cpu"
        )
    return f"torch sees a GPU and cannot use it ({' '.join(error.split())[:200]}): nvidia-smi, or --set device=cpu"


def _driver() -> str:
    """The version of the driver's kernel module, as a word to add; nothing where the system does not tell."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", file.read())
    except OSError:
        return ""
    return f" {found[1]}" if found else ""


def _unserved(name: str, capability: Capability, architectures: list[str]) -> str:
    cuda = (torch.version.cuda or "").partition(".")[0]
    older = cuda == "13" and capability == (7, 0)  # what CUDA 13 gave up and CUDA 12's wheels have
    other = "make setup CUDA=12" if older else "take another GPU"
    return (
        f"{name} has compute capability {told(capability)}, which torch {torch.__version__} is not built for "
        f"({' '.join(architectures)}): {other}, or --set device=cpu"
    )


def told(capability: Capability) -> str:
    return ".".join(map(str, capability))


def _threads(mine: tuple[int, ...], of_all: list[tuple[int, ...]]) -> int:
    """OMP_NUM_THREADS where it is set; else the cores that this rank may use, shared out where ranks may use the same ones.

    Of OpenMP's list, a number for each level of nested loops, the first. Raises UserError for what is no number of threads.
    """
    said = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not said:
        return max(1, len(mine) // of_all.count(mine))
    first = said.split(",")[0].strip()
    if not re.fullmatch("0*[1-9][0-9]{0,3}", first):
        raise UserError(
            f"OMP_NUM_THREADS={said} is no number of threads: export OMP_NUM_THREADS=1, say, or unset it"
        )
    return int(first)
