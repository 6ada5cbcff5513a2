"""Batch-norm statistics, re-estimated for averaged weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from swap_hpc.average.kinds import batchnorm_layers
from swap_hpc.average.modes import check_unwrapped, evaluating, training_modules
from swap_hpc.average.power import iterate_power_methods_
from swap_hpc.parallel.teams import Team


@torch.no_grad()
def refresh_batchnorm_(
    model: nn.Module,
    batches: Iterable[Any],
    team: Team,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> None:
    """Set batch norm's running statistics to those of all batches of all ranks. Collective.

    The mean of a layer is that of all elements that it normalises. The variance is the pooled one,
    within and between batches, with n - 1 in the denominator; both are accumulated in float64.
    Unlike the mean of batch variances, the pooled one does not depend on how samples were cut into
    batches, except through the layers before, which normalise each batch by its own statistics.

    A layer that no batch reaches keeps its statistics. So does frozen batch norm: a layer that is
    in evaluation mode while the model is in training mode, or after `model.train()`.

    Vectors of power iterations (spectral norm, old and new style) are first iterated until they
    belong to the present weights. A model without batch norm needs nothing else, and takes no
    batch.

    The averaged model needs statistics of its own (Izmailov et al., arXiv 1803.05407; phase 3 of
    Gupta, Akle Serrano, DeCoste, arXiv 2001.02312): the mean of the groups' statistics is not what
    its layers see.

    Args:
        model: the same on all ranks; changed in place. The plain module, not a
            DistributedDataParallel around it, whose forward pass would wait for other ranks.
        batches: this rank's inputs of `model`, (n, C, H, W) float or whatever it takes, on its
            device; a rank may have none. Layers other than batch norm are in evaluation mode
            meanwhile, so that nothing is dropped out.
        team: the ranks whose batches count together.
        forward: called as `forward(model, batch)`, for a model whose input is not one tensor.

    Raises:
        ValueError: the model is a DistributedDataParallel.
    """
    check_unwrapped(model)
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
            if forward:
                forward(model, batch)
            else:
                model(batch)
    # One collective for all layers.
    rows = [moments[layer].packed() for layer in layers]
    packed = torch.cat(rows).cpu()
    team.sum_(packed.numpy())
    for layer, sums in zip(layers, packed.split([len(row) for row in rows]), strict=True):
        _set_statistics_(layer, sums)


@contextmanager
def _hooked(after_forward: Mapping[_BatchNorm, Callable[..., None]]) -> Iterator[None]:
    """Call functions after their layers' forward passes, until the context ends."""
    hooks = [layer.register_forward_hook(function) for layer, function in after_forward.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class _Moments:
    """The sums over a layer's inputs from which its statistics follow."""

    batches: int
    count: int  # elements per channel
    sum: Tensor  # (C,) float64
    squares: Tensor  # (C,) float64, the sum of squares

    @classmethod
    def of(cls, layer: _BatchNorm) -> "_Moments":
        zeros = torch.zeros_like(_statistics(layer)[0], dtype=torch.float64)
        return cls(0, 0, zeros, zeros.clone())

    def add_(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Add a batch: a forward hook of the layer."""
        # With a momentum of 1 the layer has just left the batch's own mean and its variance, with
        # n - 1 in the denominator, in its buffers.
        n = output.numel() // output.size(1)
        mean, variance = (buffer.double() for buffer in _statistics(layer))
        self.batches += 1
        self.count += n
        self.sum += n * mean
        self.squares += (n - 1) * variance + n * mean**2

    def packed(self) -> Tensor:
        """Return all of it in one tensor, (2 + 2C,) float64, to be summed over ranks."""
        return torch.cat([self.sum.new_tensor([self.batches, self.count]), self.sum, self.squares])


def _set_statistics_(layer: _BatchNorm, sums: Tensor) -> None:
    """Set a layer's running statistics from packed `_Moments`."""
    batches, count = int(sums[0]), sums[1]
    if batches == 0:
        return
    total, squares = sums[2:].chunk(2)
    mean = total / count
    variance = (squares - count * mean**2) / (count - 1)
    running_mean, running_var = _statistics(layer)
    running_mean.copy_(mean)
    running_var.copy_(variance.clamp(min=0))  # rounding can leave a little less than 0
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(batches)


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var


@contextmanager
def _only_batchnorm_trains(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Let `layers` alone train, with a momentum of 1, until the context ends.

    Afterwards all modes, momenta and statistics are as they were.
    """
    momenta = {layer: layer.momentum for layer in layers}
    before = {layer: [buffer.clone() for buffer in layer.buffers()] for layer in layers}
    try:
        with evaluating(model):
            for layer in layers:
                layer.train()
                layer.reset_running_stats()  # a NaN left there would survive a momentum of 1
                layer.momentum = 1.0
            yield
    finally:
        for layer in layers:
            layer.momentum = momenta[layer]
            for buffer, old in zip(layer.buffers(), before[layer], strict=True):
                buffer.copy_(old)
