"""Batches made by a user's own function or DALI graph, checked against what was asked for."""

import threading
from collections import deque
from collections.abc import Iterator

from torch import Tensor

from swap_hpc.data.pipeline import build_pipeline, run_pipeline, to_torch
from swap_hpc.data.sampling import Picks
from swap_hpc.data.seeding import seed_all
from swap_hpc.data.splits import Batches, Graph
from swap_hpc.errors import UserError
from swap_hpc.parallel.devices import Device


def custom_batches(
    split: Batches, picks: Iterator[Picks], training: bool, batch_size: int, device: Device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the user's batches for `picks`, on the device.

    Args:
        split: the user's function or graph.
        picks: the samples of each batch.
        training: what the function gets as its second argument.
        batch_size: the largest number of samples in a pick.
        device: where the tensors go.

    Raises:
        UserError: the batches are not one for each pick, in turn.
    """
    pending: deque[int] = deque()  # sizes of the picks handed out whose batches have not come yet
    caller = threading.get_ident()

    def handed_out() -> Iterator[Picks]:
        for pick in picks:
            pending.append(len(pick.indices))
            # Whatever the function draws for this pick is the same each time. A thread that the
            # function started must not seed: the model draws from the same generators.
            if threading.get_ident() == caller:
                seed_all(pick.seed)
            yield pick

    wanted = handed_out()
    name = f"the function that makes {'training' if training else 'test'} batches"
    if isinstance(split, Graph):
        found = _graph_batches(split, split.picked(wanted), training, batch_size, device)
    else:
        found = split.read(wanted, training)
    for inputs, targets in found:
        size = pending.popleft() if pending else 0
        if len(targets) != size:
            raise UserError(
                f"{name} returned {len(targets)} targets for {size} picked samples: "
                "it must return one batch for each pick, in order"
            )
        yield (
            inputs.to(device.torch, non_blocking=True),
            targets.to(device.torch, non_blocking=True),
        )
    if pending or next(wanted, None) is not None:
        raise UserError(f"{name} ended early: it must return one batch for each pick, in order")


def _graph_batches(
    split: Graph, picks: Iterator[Picks], training: bool, batch_size: int, device: Device
) -> Iterator[tuple[Tensor, Tensor]]:
    pipeline = build_pipeline(lambda: split.function(picks, training), batch_size, device)
    for outputs in run_pipeline(pipeline, device):
        inputs, targets = (to_torch(output.as_tensor(), device) for output in outputs)
        yield inputs, targets
