"""Batches made by a user's own function or DALI graph, checked against what was asked for."""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from swap_hpc.data.nested import leaves, mapped
from swap_hpc.data.pipeline import build_pipeline, run_pipeline, to_torch
from swap_hpc.data.sampling import Picks
from swap_hpc.data.seeding import seed_all
from swap_hpc.data.splits import Batches, Graph
from swap_hpc.errors import RunError, UserError
from swap_hpc.parallel.devices import Device
from swap_hpc.recipe.imports import in_one_line


def custom_batches(
    split: Batches, picks: Iterator[Picks], training: bool, batch_size: int, device: Device
) -> Iterator[tuple[Any, Any]]:
    """Yield the user's batches for `picks`, on the device.

    Args:
        split: the user's function or graph.
        picks: the samples of each batch.
        training: what the function gets as its second argument.
        batch_size: the largest number of samples in a pick.
        device: where the tensors go.

    Raises:
        RunError: the function raises an error.
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
    for batch in _made(split, wanted, training, batch_size, device, name):
        size = pending.popleft() if pending else 0
        _check(batch, size, name)
        yield mapped(lambda tensor: tensor.to(device.torch, non_blocking=True), tuple(batch))
    if pending or next(wanted, None) is not None:
        raise UserError(f"{name} ended early: it must return one batch for each pick, in order")


def _made(
    split: Batches,
    picks: Iterator[Picks],
    training: bool,
    batch_size: int,
    device: Device,
    name: str,
) -> Iterator[Any]:
    """Yield what the user's function makes; an error in it is one line."""
    with in_one_line(f"{name} failed", RunError):
        if isinstance(split, Graph):
            found = _graph_batches(split, split.picked(picks), training, batch_size, device)
        else:
            found = split.read(picks, training)
    while True:
        with in_one_line(f"{name} failed", RunError):
            batch = next(found, None)
        if batch is None:
            return
        yield batch


def _check(batch: Any, size: int, name: str) -> None:
    """Check that a batch is a pair of tensors, or nests of them, with `size` samples each.

    Raises:
        UserError: it is not.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise UserError(
            f"{name} returned a {type(batch).__name__}: a pair (inputs, targets) is needed"
        )
    for nest, what in zip(batch, ("inputs", "targets"), strict=True):
        found = [leaf for leaf in leaves(nest) if leaf is not None]
        for leaf in found or [nest]:
            if not isinstance(leaf, Tensor):
                raise UserError(
                    f"{name} returned a {type(leaf).__name__} in its {what}: tensors are needed, "
                    "or tuples, lists and dictionaries of tensors"
                )
            if leaf.ndim == 0 or len(leaf) != size:
                raise UserError(
                    f"{name} returned {what} {list(leaf.shape)} for {size} picked samples: it must "
                    "return one batch for each pick, in order, whose tensors' first dimension is "
                    "the number of samples"
                )


def _graph_batches(
    split: Graph, picks: Iterator[Picks], training: bool, batch_size: int, device: Device
) -> Iterator[tuple[Tensor, Tensor]]:
    pipeline = build_pipeline(lambda: split.function(picks, training), batch_size, device)
    for outputs in run_pipeline(pipeline, device):
        inputs, targets = (to_torch(output.as_tensor(), device) for output in outputs)
        yield inputs, targets
