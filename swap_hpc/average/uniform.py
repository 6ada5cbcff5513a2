"""The uniform average: every group's weights, at the end of every cycle, count alike."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from swap_hpc.average.kinds import averaged_tensors, kept_tensors
from swap_hpc.average.modes import check_unwrapped
from swap_hpc.average.sharing import broadcast_states, broadcast_tensors
from swap_hpc.average.state import extra_states, set_extra_states_
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import assign_, once, real

# Elements per MPI call: 8 MiB of float64 stay in a cache from packing to rounding.
CHUNK = 8 * 2**20 // np.dtype(np.float64).itemsize


@dataclass
class WeightSum:
    """A sum of models' weights, on the host. It is empty at first.

    Attributes:
        count: the number of models added.
        sums: name -> float64 sum of the tensors that are averaged; complex ones as (..., 2).
        kept: name -> tensor of what is not averaged, from the first model added: other buffers,
            and extra states as bytes.
    """

    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def add_(self, model: nn.Module) -> None:
        """Add a model's weights."""
        check_unwrapped(model)
        averaged = averaged_tensors(model)
        kept = kept_tensors(model) | extra_states(model) if self.count == 0 else {}
        self.merge_(
            WeightSum(
                count=1,
                sums={
                    name: real(tensor).detach().to("cpu", torch.float64)
                    for name, tensor in averaged.items()
                },
                kept={name: tensor.detach().cpu().clone() for name, tensor in kept.items()},
            )
        )

    def merge_(self, other: "WeightSum") -> None:
        """Add all that was added to another sum, after what was added to this one."""
        if self.count == 0:
            self.sums = {name: tensor.clone() for name, tensor in other.sums.items()}
            self.kept = dict(other.kept)
        else:
            for name, tensor in other.sums.items():
                self.sums[name] += tensor
        self.count += other.count


@torch.no_grad()
def average_weights_(model: nn.Module, peers: Team, total: WeightSum | None = None) -> None:
    """Replace the weights of `model` by their mean over `peers`. Collective.

    This is phase 3 of SWAP (Gupta, Akle Serrano, DeCoste, arXiv 2001.02312); batch norm is left to
    `refresh_batchnorm_`.

    Averaged are the parameters (also frozen, complex and 16-bit ones) and the running statistics
    (buffers `running_*`) of layers other than batch norm. They are summed in float64, divided, and
    rounded once to their own type, so that the result does not depend on the number or the layout
    of the ranks, except for the last bits of float64 weights.

    Everything else becomes what the first rank's first model has: other buffers, what
    `get_extra_state` returns, and batch norm's statistics and the vectors of power iterations,
    which `refresh_batchnorm_` then estimates again. "What is averaged" in swap_hpc/README.md has
    the table.

    Args:
        model: changed in place, on any device. On all ranks it has the same names, shapes and
            types; afterwards also the same values. The plain module, not a DistributedDataParallel
            around it. Its tensors may have any layout in memory, such as channels_last, which they
            keep.
        peers: the ranks whose weights are averaged.
        total: the sum of the models that this rank contributes; by default it contributes `model`.
            An empty sum contributes nothing; the first rank's must not be empty. Its models have
            the names and shapes of `model`.

    Raises:
        ValueError: on all ranks, the names, shapes or types of two ranks differ, or the model is a
            DistributedDataParallel.
    """
    check_unwrapped(model)
    averaged, others = averaged_tensors(model), kept_tensors(model)
    _check_alike(averaged | others, peers)
    _set_means_(averaged, peers, total)
    kept = total.kept if total else {}
    mine = [kept.get(name, tensor) for name, tensor in others.items()]
    for tensor, first in zip(others.values(), broadcast_tensors(mine, peers), strict=True):
        assign_(tensor, first)
    states = {name: kept.get(name, state) for name, state in extra_states(model).items()}
    set_extra_states_(model, broadcast_states(states, peers))


def _check_alike(tensors: Mapping[str, Tensor], peers: Team) -> None:
    # The ranks compare a hash: the names and shapes of a large model are sent to nobody.
    layout = [(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()]
    other = peers.first_unlike(repr(layout).encode())
    if other is not None:
        raise ValueError(
            f"the model of rank {other} has other weights than that of rank 0: "
            "build it alike on all ranks"
        )


def _set_means_(tensors: Mapping[str, Tensor], peers: Team, total: WeightSum | None) -> None:
    """Replace tensors by their mean over `peers`, chunk by chunk through one buffer on the host."""
    # Each element once, complex ones as two real numbers, in C order. A tensor with another layout
    # is averaged in a copy, and copied back.
    targets = {name: real(once(tensor)).contiguous() for name, tensor in tensors.items()}
    sources = _contribution(targets, total)
    count = peers.sums(total.count if total else 1)[0]
    device = next((target.device for target in targets.values()), torch.device("cpu"))
    size = min(CHUNK, sum(target.numel() for target in targets.values()))
    host = torch.empty(size, dtype=torch.float64, pin_memory=device.type == "cuda")
    # The order is that of the model, which is the same on all ranks. That of `total` may not be: a
    # sum that was read from a file is in the file's order.
    for pieces in _chunks(targets):
        sizes = [piece.end - piece.first for piece in pieces]
        packed = host[: sum(sizes)]
        for piece, values in zip(pieces, packed.split(sizes), strict=True):
            source = piece.of(sources[piece.name].reshape(-1))
            values.copy_(source.double() if source.is_cuda else source)  # GPUs convert faster
        peers.sum_(packed.numpy())
        packed /= count
        for piece, values in zip(pieces, packed.to(device).split(sizes), strict=True):
            piece.of(targets[piece.name].view(-1)).copy_(values)
    for name, tensor in tensors.items():
        if targets[name].data_ptr() != tensor.data_ptr():
            real(once(tensor)).copy_(targets[name])


def _contribution(targets: Mapping[str, Tensor], total: WeightSum | None) -> Mapping[str, Tensor]:
    """Return what this rank adds to the sum: its own weights, its `total`, or zeros."""
    if total is None:
        return targets
    if total.count == 0:
        return {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in targets.items()}
    return total.sums


class _Piece(NamedTuple):
    """Some elements of a tensor, which is flat in C order."""

    name: str
    first: int
    end: int  # exclusive

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.first : self.end]


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[list[_Piece]]:
    """Yield pieces that cover all elements of `tensors`, at most `CHUNK` elements per list."""
    pieces: list[_Piece] = []
    room = CHUNK
    for name, tensor in tensors.items():
        start = 0
        while start < tensor.numel():
            end = min(tensor.numel(), start + room)
            pieces.append(_Piece(name, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield pieces
                pieces, room = [], CHUNK
    if pieces:
        yield pieces
