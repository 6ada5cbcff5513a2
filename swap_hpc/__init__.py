"""SWAP, Stochastic Weight Averaging in Parallel (Gupta, Akle Serrano, DeCoste, arXiv 2001.02312).

The names below are for a training loop of your own: they take plain torch modules, and any
communicator of MPI or process group of torch.distributed. They work with DistributedDataParallel,
Lightning, Horovod or none of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swap_hpc.average.agreement import weights_sha256
    from swap_hpc.average.batchnorm import refresh_batchnorm_
    from swap_hpc.average.uniform import WeightSum, average_weights_
    from swap_hpc.data import Batches, Dataset, Graph
    from swap_hpc.parallel.grid import grid
    from swap_hpc.parallel.rendezvous import distributed_environment
    from swap_hpc.parallel.teams import Team
    from swap_hpc.train.evaluation import evaluate
    from swap_hpc.train.metrics import Metric

__version__ = "0.1.0"
__all__ = [
    "Batches",
    "Dataset",
    "Graph",
    "Metric",
    "Team",
    "WeightSum",
    "average_weights_",
    "distributed_environment",
    "evaluate",
    "grid",
    "refresh_batchnorm_",
    "weights_sha256",
]

_MODULES = {
    "Batches": "data",
    "Dataset": "data",
    "Graph": "data",
    "Metric": "train.metrics",
    "Team": "parallel.teams",
    "WeightSum": "average.uniform",
    "average_weights_": "average.uniform",
    "distributed_environment": "parallel.rendezvous",
    "evaluate": "train.evaluation",
    "grid": "parallel.grid",
    "refresh_batchnorm_": "average.batchnorm",
    "weights_sha256": "average.agreement",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: most commands need neither torch nor MPI."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
