"""Batch-norm statistics, re-estimated for averaged weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swap_hpc.average.kinds import batchnorm_layers
from swap_hpc.average.modes import evaluating, training_modules
from swap_hpc.average.power import iterate_power_methods_
from swap_hpc.parallel.teams import Team


@torch.no_grad()
def refresh_batchnorm_(
    model: nn.Module,
    batches: Iterable[Any],
    team: Team,
    forward: Callable[[nn.Module, Any], object] | None = None,
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
    with (
        _only_batchnorm_trains(model, layers),
        _hooked({layer: moments[layer].add_ for layer in layers}),
    ):
        for batch in batches:
            forward(model, batch) if forward else model(batch)
    packed = torch.cat([moments[layer].packed() for layer in layers]).cpu()
    team.sum_(packed.numpy())
    for layer, sums in zip(
        layers, packed.split([len(moments[layer].packed()) for layer in layers]), strict=True
    ):
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
