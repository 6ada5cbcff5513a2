"""What each rank has of its own, in the one file of a save.

Batch norm's running statistics differ between ranks, for instance, and so do the sums of the epoch
so far. Ranks of another number share them.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from swap_hpc.parallel.teams import Team
from swap_hpc.run.buffers import mean_of, packed, unpacked
from swap_hpc.run.weights import Tensors, prefixed, without_prefix
from swap_hpc.train.events import Running
from swap_hpc.train.updates import Updates


def gathered_buffers(buffers: Tensors, team: Team) -> np.ndarray | None:
    """Return the bytes of all ranks' buffers, (ranks, n) uint8, on the first rank; collective.

    On other ranks, and where the buffers are alike, nothing is returned, and nothing is sent but a
    hash.
    """
    mine = packed(buffers)
    if team.first_unlike(mine.tobytes()) is None:
        return None
    longest = int(team.maximum(len(mine))[0])  # extra states need not be of one length
    return team.gather(np.pad(mine, (0, longest - len(mine))))


def shared_buffers(
    tensors: Tensors, means: Collection[str], prefix: str = "buffers", ranks: str = "ranks"
) -> Tensors:
    """Return the buffers in a checkpoint for ranks that did not save it."""
    buffers = without_prefix(tensors, prefix)
    if ranks not in tensors:
        return buffers
    rows = [unpacked(row, buffers) for row in tensors[ranks]]
    return mean_of(rows, [name for name in means if name in buffers])


def own_buffers(tensors: Tensors, means: Collection[str], team: Team) -> dict[str, np.ndarray]:
    """Take the buffers that differ between ranks out of the tensors of a file.

    Args:
        tensors: those of the file. For a team of another size they get the buffers that its ranks
            share.
        means: the names of the buffers whose mean another number of ranks takes.
        team: the ranks that resume.

    Returns:
        For a team of the old size: the prefix of the buffers' names in the file -> the bytes of
        all ranks' buffers, (ranks, n) uint8.
    """
    own = {}
    for prefix, ranks in {"buffers": "ranks", "ema_buffers": "ema_ranks"}.items():
        if ranks in tensors and len(tensors[ranks]) == team.size:
            own[prefix] = tensors[ranks].numpy()
        else:
            shared = shared_buffers(tensors, means, prefix, ranks)
            tensors |= prefixed(**{prefix: shared})
        tensors.pop(ranks, None)
    return own


def _running(saved: Sequence[Any]) -> Running:
    loss, sums, samples, seconds, *more = saved
    # Saves of earlier versions hold the sum of the one metric as a number, and no updates.
    sums = tuple(sums) if isinstance(sums, list) else (sums,)
    return Running(loss, sums, samples, seconds, *(Updates(*each) for each in more))


def running_of_ranks(saved: Sequence[Sequence[Any]], team: Team) -> list[Running]:
    """Return each rank's sums of the epoch so far; the first has all where the team changed."""
    running = [_running(each) for each in saved]
    if len(running) == team.size:
        return running
    nothing = total = Running(updates=running[0].updates)  # the updates are the same on all ranks
    for each in running:
        total = total.plus(each.loss, each.sums, each.samples)
    total = replace(total, seconds=max(each.seconds for each in running))
    return [total, *[nothing] * (team.size - 1)]
