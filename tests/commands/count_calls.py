"""`swap-hpc train ...` that also prints the MPI calls of phases 1 and 2, and if Horovod runs.

`mpi_calls.c` counts them; it has to be preloaded.
"""

import ctypes
from collections.abc import Iterator
from typing import Any

from swap_hpc import __main__ as cli
from swap_hpc import swap
from swap_hpc.run import loop
from swap_hpc.train.events import GroupsArrived

calls = ctypes.CDLL(None).counted_mpi_calls
calls.restype = ctypes.c_long


def watched(*arguments: Any) -> Iterator[swap.Event]:
    import horovod.torch as hvd

    start = calls()
    for event in swap.swap(*arguments):
        if isinstance(event, swap.LargeBatchEnded):
            print("large_batch calls", calls() - start, flush=True)
            yield event
            # All ranks save the end of phase 1 together: those calls belong to neither phase.
            start = calls()
        else:
            if isinstance(event, GroupsArrived):
                print("refine calls", calls() - start, "Horovod", hvd.is_initialized(), flush=True)
            yield event


loop.swap = watched  # type: ignore[assignment]
cli.main()
