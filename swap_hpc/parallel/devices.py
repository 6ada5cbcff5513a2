"""Each rank's device and CPU threads, and whether torch can use that device."""

import hashlib
import os
import platform
import re
import resource
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import torch

from swap_hpc.errors import UserError
from swap_hpc.parallel.teams import Team

Wanted = Literal["auto", "cpu", "cuda"]  # a recipe's `device`

Capability = tuple[int, int]  # a GPU's compute capability, (major, minor)

BF16: Capability = (8, 0)  # the first with bfloat16; older GPUs emulate it, slowly

FP16: Capability = (5, 3)  # the first that computes in float16

# The oldest driver for each major version of CUDA, from NVIDIA's guide "CUDA Compatibility".
DRIVERS = {"12": 525, "13": 580}


@dataclass(frozen=True)
class Device:
    """A rank's device: a GPU or the CPU."""

    torch: torch.device
    threads: int  # of the CPU, for this rank
    uuid: str | None = None  # of the GPU; None on a CPU
    capability: Capability | None = None  # of the GPU; None on a CPU

    @property
    def name(self) -> str:
        """The GPU's model, or "cpu"."""
        return torch.cuda.get_device_name(self.torch) if self.torch.type == "cuda" else "cpu"

    def is_shared(self, team: Team) -> bool:
        """Tell whether two ranks of `team` use one GPU. Collective.

        NCCL refuses that: the gradients of such a team go through host memory.
        """
        if not team.any(self.uuid is not None):
            return False
        # Not only within a node: containers with names of their own may share a GPU. Two GPUs are
        # taken for one with a probability of 1 in 2^31, and then sums only take longer.
        colour = int.from_bytes(hashlib.sha256(str(self.uuid).encode()).digest()[:4], "little") >> 1
        same = team.split(colour)
        is_mine_shared = self.uuid is not None and same.size > 1
        same.free()
        return team.any(is_mine_shared)

    def peak_memory(self) -> "Memory":
        """Return the most memory that this process has had since it began."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # from KiB
        if self.torch.type != "cuda":
            return Memory(host)
        allocated = torch.cuda.max_memory_allocated(self.torch)
        reserved = torch.cuda.max_memory_reserved(self.torch)
        return Memory(host, allocated, reserved)


@dataclass(frozen=True)
class Memory:
    """The peak memory of a process, or the largest peaks of several processes, in bytes.

    The GPU's numbers count what torch takes: not the buffers of DALI and NCCL, nor the few hundred
    MiB of CUDA itself.
    """

    host: int  # resident set
    gpu_allocated: int = 0  # in tensors; 0 without a GPU
    gpu_reserved: int = 0  # in tensors, and kept for later ones; 0 without a GPU


def use_device(world: Team, node: Team, wanted: Wanted) -> Device:
    """Choose this process's device, and make it torch's current one. Collective over `world`.

    torch also gets the device's number of CPU threads.

    Args:
        world: all ranks of the job.
        node: the ranks of `world` on this node.
        wanted: a recipe's `device`.

    Raises:
        UserError: on all ranks of `world`, as `choose_device` does; or some ranks have a GPU and
            others none; or a GPU is busy.
    """
    device = world.agree(lambda: choose_device(node, wanted))
    without = world.first_where(device.torch.type == "cpu")
    if without is not None and world.any(device.torch.type != "cpu"):
        raise UserError(
            f"rank {without} sees no GPU, others do: "
            "ask the launcher for a GPU per rank, or --set device=cpu"
        )
    torch.set_num_threads(device.threads)
    world.agree(lambda: _make_current(device))
    return device


def _make_current(device: Device) -> None:
    # CUDA's context begins here: another process may have the GPU to itself.
    if device.torch.type != "cuda":
        return
    try:
        torch.cuda.set_device(device.torch)
    except RuntimeError as error:
        raise UserError(_unusable(str(error))) from None


def choose_device(node: Team, wanted: Wanted) -> Device:
    """Return this rank's device: the GPU numbered like its local rank, or the CPU. Collective.

    This holds whether a launcher shows each rank one GPU or all of the node's. Where a node has
    more ranks than GPUs, the ranks are dealt out to the GPUs in turn.

    Args:
        node: the ranks on this node.
        wanted: a recipe's `device`; with "auto", the CPU is used where torch sees no GPU.

    Raises:
        UserError: on all ranks of the node, there is no GPU but `wanted` is "cuda"; torch cannot
            use the GPU or its driver; or OMP_NUM_THREADS is not a number.
    """
    cores = tuple(sorted(os.sched_getaffinity(0)))
    sharing = _ranks_sharing(cores, node)
    threads = node.agree(lambda: _threads(cores, sharing))
    gpu = node.agree(lambda: _gpu(node.rank, wanted, threads))
    return gpu if gpu else Device(torch.device("cpu"), threads)


def _gpu(local_rank: int, wanted: Wanted, threads: int) -> Device | None:
    if wanted == "cpu":
        return None
    visible = torch.cuda.device_count()  # also counts GPUs that torch cannot use
    if not visible:
        if wanted == "cuda":
            raise UserError(
                'device = "cuda", but torch sees no GPU on this host: '
                "--set device=cpu, or ask the launcher for GPUs"
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
    """Tell whether code built for some architectures runs on a GPU.

    Machine code ("sm_80") runs on GPUs of the same major version, from its minor version on; with a
    letter ("sm_90a") it runs on that capability only. PTX ("compute_80") runs on all newer GPUs,
    too.

    Args:
        architectures: as `torch.cuda.get_arch_list()` names them.
        capability: the GPU's.
    """
    if not architectures:
        return True  # torch does not know what it was built for
    return any(_runs_on(architecture, capability) for architecture in architectures)


def _runs_on(architecture: str, capability: Capability) -> bool:
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
    if not found:
        return False
    kind, major, minor, letter = found.groups()
    built_for = (int(major), int(minor))
    if built_for == capability:
        return True
    newer = built_for < capability and not letter
    return newer and (kind == "compute" or built_for[0] == capability[0])


def _unusable(error: str) -> str:
    """Return one line with a hint for torch's error about a GPU that it sees and cannot use."""
    cuda = _cuda_major()
    if "driver" in error and "too old" in error:
        needed = DRIVERS.get(cuda, "a newer one")
        other = ", make setup CUDA=12," if cuda == "13" else ""
        return (
            f"the GPU's driver{_driver()} is too old for CUDA {cuda}, "
            f"which needs {needed} or newer: update it{other} or --set device=cpu"
        )
    reason = textwrap.shorten(error, 200, placeholder=" ...")
    return f"torch sees a GPU and cannot use it ({reason}): nvidia-smi, or --set device=cpu"


def _cuda_major() -> str:
    """Return the major version of torch's CUDA, for example "13"; empty without CUDA."""
    return (torch.version.cuda or "").partition(".")[0]


def _driver() -> str:
    """Return a space and the version of the driver's kernel module; empty where it is not known."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", file.read())
    except OSError:
        return ""
    return f" {found[1]}" if found else ""


def _unserved(name: str, capability: Capability, architectures: list[str]) -> str:
    """Return one line with a hint for a GPU that torch was not built for."""
    # CUDA 13 dropped the V100, which the wheels for CUDA 12 still serve.
    dropped = _cuda_major() == "13" and capability == (7, 0)
    hint = "make setup CUDA=12" if dropped else "take another GPU"
    return (
        f"{name} has compute capability {dotted(capability)}, "
        f"which torch {torch.__version__} is not built for ({' '.join(architectures)}): "
        f"{hint}, or --set device=cpu"
    )


def dotted(capability: Capability) -> str:
    """Return a compute capability as NVIDIA writes it, for example "8.0"."""
    return ".".join(map(str, capability))


def _ranks_sharing(cores: tuple[int, ...], node: Team) -> int:
    """Return the number of ranks on this node that may use the same cores as this one."""
    mine = repr(cores).encode()
    if node.first_unlike(mine) is None:
        return node.size
    return node.allgather(mine).count(mine)


def _threads(mine: tuple[int, ...], sharing: int) -> int:
    """Return OMP_NUM_THREADS where it is set, else this rank's share of the cores that it may use.

    Args:
        mine: the cores that this rank may use.
        sharing: the number of ranks that may use the same ones.

    Raises:
        UserError: OMP_NUM_THREADS is not a number of threads.
    """
    value = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not value:
        return max(1, len(mine) // sharing)
    # OpenMP allows a list, with a number for each level of nested loops.
    outermost = value.split(",")[0].strip()
    if not re.fullmatch("0*[1-9][0-9]{0,3}", outermost):
        raise UserError(
            f"OMP_NUM_THREADS={value} is no number of threads: "
            "export OMP_NUM_THREADS=1, say, or unset it"
        )
    return int(outermost)


def cpu_model() -> str:
    """Return the name of this host's CPU, or its architecture where Linux does not name it."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
