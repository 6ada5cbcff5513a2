"""Weights averaged over groups and cycles, and batch norm re-estimated for them."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from swap_hpc.average.kinds import averaged_tensors, kept_tensors
from swap_hpc.average.sharing import _share_extra_states_, broadcast_tensors
from swap_hpc.average.state import extra_states
from swap_hpc.parallel.teams import Team
from swap_hpc.parallel.tensors import assign_, once, real

CHUNK = (
    8 * 2**20 // 8
)  # float64 elements per MPI call: 8 MiB stay in a cache from packing to rounding


@dataclass
class WeightSum:
    """A sum of weights: float64, on the host; of complex ones their parts, (..., 2)."""

    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)  # of what is averaged
    kept: dict[str, Tensor] = field(
        default_factory=dict
    )  # of what is not (other buffers, extra states): the first one's

    @torch.no_grad()
    def add_(self, model: nn.Module) -> None:
        kept = kept_tensors(model) | extra_states(model) if self.count == 0 else {}
        self.merge_(
            WeightSum(
                1,
                {
                    name: real(t).detach().to("cpu", torch.float64)
                    for name, t in averaged_tensors(model).items()
                },
                {name: t.detach().cpu().clone() for name, t in kept.items()},
            )
        )

    def merge_(self, other: "WeightSum") -> None:
        if self.count == 0:
            self.sums = {name: t.clone() for name, t in other.sums.items()}
            self.kept = dict(other.kept)
        else:
            for name, tensor in other.sums.items():
                self.sums[name] += tensor
        self.count += other.count


@torch.no_grad()
def average_weights_(model: nn.Module, peers: Team, total: WeightSum | None = None) -> None:
    """Replaces the weights of `model` by their mean over `peers`, on every rank.

    Each rank contributes `model` itself, or, where given, all that was added to `total` (nothing where nothing was, but
    not so on the first rank). Parameters (frozen, complex and 16-bit ones, too) and running means of layers other than
    batch norm are summed in float64 by MPI_Allreduce, in chunks of a few MiB, divided, and rounded once to their own
    type: the result does not depend on the number or the layout of the ranks. Everything else comes from the first
    rank's first contribution: other buffers, batch-norm statistics and vectors of power iterations, which
    `refresh_batchnorm_` estimates anew, and what `get_extra_state` returns. The README has the table.

    `model`: the plain module, alike on all ranks but for its values; what its state dict hands out does not matter. Its
    tensors may lie in memory in any order (channels_last). Raises ValueError, on all ranks, where names, shapes or types
    differ.
    """
    targets, others = averaged_tensors(model), kept_tensors(model)
    _check_alike(targets | others, peers)
    _set_means_(targets, peers, total)
    kept = total.kept if total else {}
    first = broadcast_tensors([kept.get(name, tensor) for name, tensor in others.items()], peers)
    for tensor, value in zip(others.values(), first, strict=True):
        assign_(tensor, value)
    _share_extra_states_(model, peers, kept)


def _check_alike(tensors: Mapping[str, Tensor], peers: Team) -> None:
    layout = [(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()]
    digests = peers.allgather(hashlib.sha256(repr(layout).encode()).digest())
    if other := next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None):
        raise ValueError(
            f"the model of rank {other} has other weights than that of rank 0: build it alike on all ranks"
        )


def _set_means_(tensors: Mapping[str, Tensor], peers: Team, total: WeightSum | None) -> None:
    # Real numbers in C order: what lies in memory in another order is averaged in a copy, and copied back.
    targets = {name: real(once(t)).contiguous() for name, t in tensors.items()}
    zeros = (
        {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in targets.items()}
        if total and not total.count
        else {}
    )
    sources = (total.sums or zeros) if total else targets
    count = peers.sums(total.count if total else 1)[0]
    device = next((t.device for t in targets.values()), torch.device("cpu"))
    room = min(CHUNK, sum(t.numel() for t in targets.values()))
    host = torch.empty(
        room, dtype=torch.float64, pin_memory=device.type == "cuda"
    )  # one chunk, used again and again
    for pieces in _chunks(
        targets
    ):  # whose order is the same on all ranks; that of sums that come from a file is not
        sizes = [b - a for _, a, b in pieces]
        packed = host[: sum(sizes)]
        for (name, a, b), values in zip(pieces, packed.split(sizes), strict=True):
            piece = sources[name].reshape(-1)[a:b]
            values.copy_(
                piece.double() if piece.is_cuda else piece
            )  # a GPU converts faster than the host
        peers.sum_(packed.numpy())
        packed /= count
        for (name, a, b), values in zip(pieces, packed.to(device).split(sizes), strict=True):
            targets[name].view(-1)[a:b].copy_(values)
    for name, tensor in tensors.items():
        if targets[name].data_ptr() != tensor.data_ptr():
            real(once(tensor)).copy_(targets[name])


def _chunks(tensors: dict[str, Tensor]) -> Iterator[list[tuple[str, int, int]]]:
    """Lists of (name, first, end) that cover all elements of `tensors`, at most `CHUNK` of them per list."""
    pieces: list[tuple[str, int, int]] = []
    room = CHUNK
    for name, tensor in tensors.items():
        start = 0
        while start < tensor.numel():
            end = min(tensor.numel(), start + room)
            pieces.append((name, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield pieces
                pieces, room = [], CHUNK
    if pieces:
        yield pieces
