"""SWAP, Stochastic Weight Averaging in Parallel (Gupta, Akle Serrano, DeCoste, arXiv 2001.02312).

As a library, for a training loop of one's own: the names below, on plain torch modules and any MPI communicator, with
DistributedDataParallel, Horovod or neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swap_hpc.averaging import average_weights_, refresh_batchnorm_
    from swap_hpc.data import Batches, Dataset, Graph
    from swap_hpc.evaluation import evaluate
    from swap_hpc.ranks import Team, grid

__version__ = "0.1.0"
__all__ = ["Batches", "Dataset", "Graph", "Team", "average_weights_", "evaluate", "grid", "refresh_batchnorm_"]

_HOMES = {
    **dict.fromkeys(("average_weights_", "refresh_batchnorm_"), "averaging"),
    **dict.fromkeys(("Batches", "Dataset", "Graph"), "data"),
    "evaluate": "evaluation",
    **dict.fromkeys(("Team", "grid"), "ranks"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
