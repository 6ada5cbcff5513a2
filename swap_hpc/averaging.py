"""Weights averaged over groups and cycles, and batch norm re-estimated for them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swap_hpc.errors import RunError
from swap_hpc.kinds import (
    averaged_tensors,
    batchnorm_layers,
    extra_states,
    kept_tensors,
    set_extra_states_,
    state_of,
    team_means,
    training_modules,
)
from swap_hpc.models import evaluating
from swap_hpc.power import iterate_power_methods_
from swap_hpc.ranks import Team
from swap_hpc.tensors import assign_, from_bytes, once, real, tensor_bytes

CHUNK = 8 * 2**20 // 8  # float64 elements per MPI call: 8 MiB stay in a cache from packing to rounding


@dataclass
class WeightSum:
    """A sum of weights: float64, on the host; of complex ones their parts, (..., 2)."""

    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)  # of what is averaged
    kept: dict[str, Tensor] = field(default_factory=dict)  # of what is not (other buffers, extra states): the first one's

    @torch.no_grad()
    def add_(self, model: nn.Module) -> None:
        kept = kept_tensors(model) | extra_states(model) if self.count == 0 else {}
        self.merge_(
            WeightSum(
                1,
                {name: real(t).detach().to("cpu", torch.float64) for name, t in averaged_tensors(model).items()},
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
        raise ValueError(f"the model of rank {other} has other weights than that of rank 0: build it alike on all ranks")


def _set_means_(tensors: Mapping[str, Tensor], peers: Team, total: WeightSum | None) -> None:
    # Real numbers in C order: what lies in memory in another order is averaged in a copy, and copied back.
    targets = {name: real(once(t)).contiguous() for name, t in tensors.items()}
    zeros = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in targets.items()} if total and not total.count else {}
    sources = (total.sums or zeros) if total else targets
    count = peers.sums(total.count if total else 1)[0]
    device = next((t.device for t in targets.values()), torch.device("cpu"))
    room = min(CHUNK, sum(t.numel() for t in targets.values()))
    host = torch.empty(room, dtype=torch.float64, pin_memory=device.type == "cuda")  # one chunk, used again and again
    for pieces in _chunks(targets):  # whose order is the same on all ranks; that of sums that come from a file is not
        sizes = [b - a for _, a, b in pieces]
        packed = host[: sum(sizes)]
        for (name, a, b), values in zip(pieces, packed.split(sizes), strict=True):
            piece = sources[name].reshape(-1)[a:b]
            values.copy_(piece.double() if piece.is_cuda else piece)  # a GPU converts faster than the host
        peers.sum_(packed.numpy())
        packed /= count
        for (name, a, b), values in zip(pieces, packed.to(device).split(sizes), strict=True):
            targets[name].view(-1)[a:b].copy_(values)
    for name, tensor in tensors.items():
        if targets[name].data_ptr() != tensor.data_ptr():
            real(once(tensor)).copy_(targets[name])


def _share_extra_states_(model: nn.Module, team: Team, mine: Mapping[str, Tensor] = MappingProxyType({})) -> None:
    """Gives every rank of `team` the first one's extra states: those of `mine`, or those that the model has."""
    states = extra_states(model)
    if states:
        shared = team.broadcast({name: tensor_bytes(mine.get(name, state)) for name, state in states.items()})
        set_extra_states_(model, {name: torch.from_numpy(state) for name, state in shared.items()})


@torch.no_grad()
def broadcast_weights_(model: nn.Module, team: Team) -> None:
    """Gives every rank of `team` the first one's parameters, buffers and extra states, whatever their types."""
    if team.size > 1:
        for tensor in (*model.parameters(), *model.buffers()):
            assign_(tensor, broadcast_tensors([tensor], team)[0])
        _share_extra_states_(model, team)


def broadcast_tensors(tensors: list[Tensor], team: Team) -> list[Tensor]:
    """The first rank's `tensors`, on the CPU; as bytes of one message, since MPI does not know every type."""
    mine = [tensor_bytes(tensor) for tensor in tensors]
    packed = team.broadcast_(np.concatenate([np.empty(0, np.uint8), *mine]))
    ends = np.cumsum([len(each) for each in mine])
    parts = [torch.from_numpy(packed[end - len(each) : end]) for each, end in zip(mine, ends, strict=True)]
    return [from_bytes(part, t.dtype, t.shape) for part, t in zip(parts, tensors, strict=True)]


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


@torch.no_grad()
def average_buffers_(model: nn.Module, team: Team) -> None:
    """Makes buffers alike on all ranks of `team`, each of which saw other shares of the batches.

    Running statistics of the layers that are in training mode become their mean over the ranks, all other buffers the
    first rank's.
    """
    if team.size == 1:
        return
    means = {name: once(buffer) for name, buffer in team_means(model).items()}
    places = {buffer.data_ptr() for buffer in means.values()}
    others = [b for b in model.buffers() if b.data_ptr() not in places]
    for buffer, first in zip(others, broadcast_tensors(others, team), strict=True):
        assign_(buffer, first)
    if not means:
        return
    packed = torch.cat([real(b).reshape(-1) for b in means.values()]).to("cpu", torch.float64)
    mean = torch.from_numpy(team.sum_(packed.numpy())) / team.size
    for buffer, values in zip(means.values(), mean.split([real(b).numel() for b in means.values()]), strict=True):
        real(buffer).copy_(values.view(real(buffer).shape))


def share_extra_states_(model: nn.Module, team: Team) -> None:
    """Gives every rank of `team` the first one's extra states (`get_extra_state`)."""
    if team.size > 1:
        _share_extra_states_(model, team)


@torch.no_grad()
def refresh_batchnorm_(
    model: nn.Module, batches: Iterable[Any], team: Team, forward: Callable[[nn.Module, Any], object] | None = None
) -> None:
    """Sets the running statistics of batch norm to those of all batches of all ranks of `team`.

    Before that, the vectors of power iterations (spectral norm, old and new style) are iterated anew for the weights as
    they are; without batch norm this is all, and no batch is asked for. Layers that keep their statistics while the
    model trains (frozen batch norm: in evaluation mode now, or after `model.train()`) keep them here.

    Args:
        model: its batch-norm layers are changed, in place, alike on all ranks. The plain module, not a DistributedDataParallel
            around it, whose forward pass would wait for other ranks.
        batches: this rank's inputs of `model`, (n, C, H, W) or whatever it takes. Each is normalised by its own
            statistics on its way through the layers, as in training. Only batch-norm layers are in training mode.
        team: the ranks whose batches count.
        forward: takes `model` and a batch, and passes one through the other, for models whose input is not one tensor.

    A layer's mean is that of all its inputs' elements, its variance the pooled one (within and between batches, n - 1),
    accumulated in float64: unlike the mean of batch variances it does not depend on how samples were cut into batches,
    but for what normalisation of earlier layers did. A layer that no batch reached keeps its statistics.
    """
    training = training_modules(model)
    iterate_power_methods_(model, training, team)
    layers = [layer for _, layer in batchnorm_layers(model) if layer in training]
    if not layers:
        return
    moments = {layer: _Moments.of(layer) for layer in layers}
    with _only_batchnorm_trains(model, layers), _hooked({layer: moments[layer].add_ for layer in layers}):
        for batch in batches:
            forward(model, batch) if forward else model(batch)
    packed = torch.cat([moments[layer].packed() for layer in layers]).cpu()
    team.sum_(packed.numpy())
    for layer, sums in zip(layers, packed.split([len(moments[layer].packed()) for layer in layers]), strict=True):
        _set_statistics_(layer, sums)


@contextmanager
def _hooked(after_forward: Mapping[_BatchNorm, Callable[..., None]]) -> Iterator[None]:
    """Calls functions after their layers' forward passes, until the block ends or raises."""
    hooks = [layer.register_forward_hook(function) for layer, function in after_forward.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Moments:
    """Count of batches and of elements, sum and sum of squares of one layer's inputs: float64, per channel."""

    batches: int
    count: int
    sum: Tensor
    squares: Tensor

    @classmethod
    def of(cls, layer: _BatchNorm) -> "_Moments":
        zeros = torch.zeros_like(_statistics(layer)[0], dtype=torch.float64)
        return cls(0, 0, zeros, zeros.clone())

    def add_(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # with momentum 1 the layer has just left the batch's own mean and unbiased variance in its buffers
        n = output.numel() // output.size(1)
        mean, variance = (b.double() for b in _statistics(layer))
        self.batches += 1
        self.count += n
        self.sum += n * mean
        self.squares += (n - 1) * variance + n * mean**2

    def packed(self) -> Tensor:
        return torch.cat([self.sum.new_tensor([self.batches, self.count]), self.sum, self.squares])


def _set_statistics_(layer: _BatchNorm, sums: Tensor) -> None:
    batches, count = int(sums[0]), sums[1]
    if batches == 0:
        return
    total, squares = sums[2:].chunk(2)
    mean = total / count
    running_mean, running_var = _statistics(layer)
    running_mean.copy_(mean)
    running_var.copy_(((squares - count * mean**2) / (count - 1)).clamp(min=0))
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(batches)


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var


@contextmanager
def _only_batchnorm_trains(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    momenta = {layer: layer.momentum for layer in layers}
    before = {layer: [b.clone() for b in layer.buffers()] for layer in layers}
    try:
        with evaluating(model):
            for layer in layers:
                layer.train()
                layer.reset_running_stats()  # a NaN left there would survive momentum 1
                layer.momentum = 1.0
            yield
    finally:
        for layer in layers:
            layer.momentum = momenta[layer]
            for buffer, old in zip(layer.buffers(), before[layer], strict=True):
                buffer.copy_(old)


def weights_sha256(model: nn.Module) -> str:
    """A hash of the state dict: sorted names, dtypes, shapes, C-contiguous little-endian bytes."""
    return hashed(state_of(model)).hexdigest()


def hashed(tensors: Mapping[str, Tensor]) -> "hashlib._Hash":
    """SHA-256 of tensors: their sorted names, dtypes, shapes, C-contiguous little-endian bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor).data)
    return digest


def check_equal(model: nn.Module, team: Team) -> str:
    """The hash of `model`. Raises RunError where it differs between the ranks of `team`."""
    digest = weights_sha256(model)
    if len(set(team.allgather(digest))) > 1:
        raise RunError("the ranks hold different averaged weights: a fault in MPI or in memory; run swap-hpc doctor")
    return digest
