"""SWAP, Stochastic Weight Averaging in Parallel (Gupta, Akle Serrano, DeCoste, arXiv 2001.02312).

As a library, for a training loop of one's own: the names below, on plain torch modules and any MPI communicator, with
DistributedDataParallel, Horovod or neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swap_hpc.average.batchnorm import refresh_batchnorm_
    from swap_hpc.average.uniform import average_weights_
    from swap_hpc.data import Batches, Dataset, Graph
    from swap_hpc.parallel.grid import grid
    from swap_hpc.parallel.teams import Team
    from swap_hpc.train.evaluation import evaluate

__version__ = "0.1.0"
__all__ = [
    "Batches",
    "Dataset",
    "Graph",
    "Team",
    "average_weights_",
    "evaluate",
    "grid",
    "refresh_batchnorm_",
]

_HOMES = {
    "average_weights_": "average.uniform",
    "refresh_batchnorm_": "average.batchnorm",
    **dict.fromkeys(("Batches", "Dataset", "Graph"), "data"),
    "evaluate": "train.evaluation",
    "Team": "parallel.teams",
    "grid": "parallel.grid",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
