"""Models for `fuzz.py`, drawn from a seed: everything a module may hold, mixed at random.

A round of `ROUND` consecutive seeds holds every ingredient at least once, and every kind of model
that must be refused exactly once. The seed chooses the structure. As with any builder, the values
come from torch's generator.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from swap_hpc.data.dataset import Dataset
from swap_hpc.data.sampling import Picks
from swap_hpc.data.splits import Batches

CLASSES = 3
WIDTH = 4  # channels of an image inside a model
FEATURES = 16  # of a sample, after the layers for images
TRAIN, TEST = 96, 24  # samples
ROUND = 20  # seeds

Change: TypeAlias = Callable[[nn.Module], nn.Module]


# The data


def images(train: bool) -> tuple[Tensor, Tensor]:
    """Return a split's samples, (n, 1, 8, 8) float32, (n,) int64. A class is a stripe in noise."""
    generator = torch.Generator().manual_seed(int(train))
    samples = TRAIN if train else TEST
    labels = torch.randint(0, CLASSES, (samples,), generator=generator)
    pixels = torch.randn(samples, 1, 8, 8, generator=generator)
    pixels[torch.arange(samples), 0, 2 * labels + 1] += 0.5
    return pixels, labels


def data(path: Path) -> Dataset:
    """Return the data set that `data.name` names, without augmentation or a DALI pipeline."""

    def batches(picks: Iterator[Picks], training: bool) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, labels = images(training)
        for pick in picks:
            which = torch.from_numpy(pick.indices)
            yield inputs[which], labels[which]

    splits = Batches(TRAIN, batches), Batches(TEST, batches)
    return Dataset(*splits, classes=tuple("abc"), channels=1)


# The frame that ingredients add their layers to


class Mixture(nn.Module):
    """Images (n, channels, 8, 8) -> logits (n, classes); every layer is a residual branch."""

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.images = nn.ModuleList()  # each (n, WIDTH, 8, 8) -> the same
        self.features = nn.ModuleList()  # each (n, FEATURES) -> the same
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.images:
            x = x + F.silu(layer(x))
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        for layer in self.features:
            x = x + F.silu(layer(x))
        return self.head(x)


Ingredient: TypeAlias = Callable[[Mixture, random.Random], None]  # adds to a model


def convolution() -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1)


def linear() -> nn.Linear:
    return nn.Linear(FEATURES, FEATURES)


def add_convolution_or_linear(model: Mixture, draw: random.Random, change: Change) -> None:
    if draw.random() < 0.5:
        model.images.append(change(convolution()))
    else:
        model.features.append(change(linear()))


def wrap_some_layer(model: Mixture, draw: random.Random, wrapper: Change) -> None:
    """Wrap one of the layers that other ingredients added, or a new one."""
    layers = [(branch, i) for branch in (model.images, model.features) for i in range(len(branch))]
    if not layers:
        model.features.append(linear())
        layers = [(model.features, 0)]
    branch, i = draw.choice(layers)
    branch[i] = wrapper(branch[i])


# Normalisations


class BatchNormTwice(nn.Module):
    """One batch-norm layer that sees two inputs in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) - self.norm(x.abs())


class BatchNorm3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x[:, :, None]).squeeze(2)


class FrozenBatchNorm(nn.Module):
    """A pretrained layer that keeps its statistics while it trains, as often in fine-tuning."""

    def __init__(self, weights_too: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(WIDTH)
        statistics = self.norm.running_mean, self.norm.running_var
        for tensor, value in zip(statistics, (0.3, 2.0), strict=True):
            assert tensor is not None
            tensor.fill_(value)
        self.norm.requires_grad_(not weights_too)

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Unreached(nn.Module):
    """Layers that no forward pass reaches."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.spare = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def batch_norm_1d(model: Mixture, draw: random.Random) -> None:
    model.features.append(nn.BatchNorm1d(FEATURES, affine=draw.random() < 0.7))


def batch_norm_2d(model: Mixture, draw: random.Random) -> None:
    model.images.append(nn.Sequential(convolution(), nn.BatchNorm2d(WIDTH)))


def batch_norm_3d(model: Mixture, draw: random.Random) -> None:
    model.images.append(BatchNorm3d())


def batch_norm_cumulative(model: Mixture, draw: random.Random) -> None:
    model.images.append(nn.BatchNorm2d(WIDTH, momentum=None))


def batch_norm_untracked(model: Mixture, draw: random.Random) -> None:
    model.images.append(nn.BatchNorm2d(WIDTH, track_running_stats=False))


def batch_norm_frozen(model: Mixture, draw: random.Random) -> None:
    model.images.append(FrozenBatchNorm(weights_too=draw.random() < 0.5))


def batch_norm_twice(model: Mixture, draw: random.Random) -> None:
    model.features.append(BatchNormTwice())


def batch_norm_unreached(model: Mixture, draw: random.Random) -> None:
    model.features.append(Unreached(nn.BatchNorm1d(FEATURES)))


def batch_norm_sync(model: Mixture, draw: random.Random) -> None:
    model.images.append(nn.SyncBatchNorm(WIDTH))


def group_norm(model: Mixture, draw: random.Random) -> None:
    model.images.append(nn.GroupNorm(draw.choice([1, 2, 4]), WIDTH))


def layer_norm(model: Mixture, draw: random.Random) -> None:
    model.features.append(nn.LayerNorm(FEATURES))


def instance_norm(model: Mixture, draw: random.Random) -> None:
    model.images.append(nn.InstanceNorm2d(WIDTH, affine=draw.random() < 0.5))


def instance_norm_running(model: Mixture, draw: random.Random) -> None:
    affine = draw.random() < 0.5
    model.images.append(nn.InstanceNorm2d(WIDTH, affine=affine, track_running_stats=True))


# Parametrizations


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.T) / 2


class Scaled(nn.Module):
    """A parametrization of a user's own, with a table that nothing changes."""

    scale: Tensor  # (rows, 1)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(FEATURES, 1) + 0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


class OwnPowerIteration(nn.Module):
    """A user's own spectral norm: `left` follows the weight in training mode."""

    left: Tensor  # (rows,), of length 1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("left", F.normalize(torch.randn(FEATURES), dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            right = F.normalize(weight.T @ self.left, dim=0)
            if self.training:
                self.left.copy_(F.normalize(weight @ right, dim=0))
                right = F.normalize(weight.T @ self.left, dim=0)
        # A clone, because another forward pass may change it before the backward pass reads it.
        return weight / torch.dot(self.left.clone(), weight @ right)


def parametrized(change: Callable[[], nn.Module]) -> Ingredient:
    def add(model: Mixture, draw: random.Random) -> None:
        layer = linear()
        parametrize.register_parametrization(layer, "weight", change())
        model.features.append(layer)

    return add


def weight_norm_old(model: Mixture, draw: random.Random) -> None:
    add_convolution_or_linear(model, draw, nn.utils.weight_norm)


def weight_norm_new(model: Mixture, draw: random.Random) -> None:
    add_convolution_or_linear(model, draw, parametrizations.weight_norm)


def spectral_norm_old(model: Mixture, draw: random.Random) -> None:
    add_convolution_or_linear(model, draw, nn.utils.spectral_norm)


def spectral_norm_new(model: Mixture, draw: random.Random) -> None:
    add_convolution_or_linear(model, draw, parametrizations.spectral_norm)


def orthogonal(model: Mixture, draw: random.Random) -> None:
    model.features.append(parametrizations.orthogonal(linear()))


def pruned(model: Mixture, draw: random.Random) -> None:
    amount = draw.choice([0.2, 0.5])

    def prune_weight(layer: nn.Module) -> nn.Module:
        return prune.l1_unstructured(layer, "weight", amount)

    add_convolution_or_linear(model, draw, prune_weight)


# Buffers


class FloatTable(nn.Module):
    """A buffer of 0 to 3 dimensions, constant or following the images."""

    table: Tensor

    def __init__(self, dimensions: int, moves: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.moves = moves
        shape = (WIDTH, 8, 8)[3 - dimensions :]
        self.register_buffer("table", torch.randn(shape).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.moves:
            mean = x.detach().mean(dim=tuple(range(4 - self.table.ndim)))
            self.table.lerp_(mean.to(self.table.dtype), 0.2)
        return 0.1 * (x + self.table.to(x.dtype))


class CausalAttention(nn.Module):
    """Rows attend to rows above them: a constant mask of zeros and minus infinities."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((8, 8), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.transpose(2, 3) / 8 + self.mask, dim=-1) @ x


class Count(nn.Module):
    """An integer that grows with the images seen, and that the output depends on."""

    count: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += (x > 0).sum().to(self.count.dtype)
        return x * (0.1 + (self.count[0] % 7) / 70)


class Active(nn.Module):
    """A mask of channels that follows the images."""

    active: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("active", torch.ones(WIDTH, 1, 1, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.active.copy_((x.mean(dim=(0, 2, 3)) > 0).view(-1, 1, 1))
        return x * self.active.clone()


class Spectrum(nn.Module):
    """A complex buffer that follows the images."""

    spectrum: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spectrum", torch.randn(8, 5, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            seen = torch.fft.rfft2(x.detach().mean(dim=(0, 1)))
            self.spectrum.mul_(0.9).add_(0.1 * seen)
        return 0.1 * x + 0.01 * torch.fft.irfft2(self.spectrum, s=(8, 8))


class Expanded(nn.Module):
    """A mask made by expand(): one stored row, seen many times."""

    mask: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        row = (torch.arange(8) % 3 > 0).to(dtype)
        self.register_buffer("mask", row.expand(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


class NonPersistent(nn.Module):
    """A table that every build makes anew, and a buffer that is None."""

    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-1, 1, 8), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * x + self.grid


class Centred(nn.Module):
    """Running statistics of a user's own layer."""

    running_mean: Tensor
    running_power: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(FEATURES))
        self.register_buffer("running_power", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            seen = x.detach()
            self.running_mean.lerp_(seen.mean(0), 0.1)
            self.running_power.lerp_(seen.double().square().mean(), 0.1)
        return (x - self.running_mean) / float(1 + self.running_power)


def float_table(model: Mixture, draw: random.Random) -> None:
    dtype = draw.choice([torch.float32, torch.float32, torch.float64])
    model.images.append(FloatTable(draw.randrange(4), draw.random() < 0.7, dtype))


def float_scalar(model: Mixture, draw: random.Random) -> None:
    model.images.append(FloatTable(0, draw.random() < 0.5, torch.float32))


def infinite_mask(model: Mixture, draw: random.Random) -> None:
    model.images.append(CausalAttention())


def integer_buffer(model: Mixture, draw: random.Random) -> None:
    model.images.append(Count(draw.choice([torch.int64, torch.int32, torch.int16, torch.uint8])))


def bool_buffer(model: Mixture, draw: random.Random) -> None:
    model.images.append(Active())


def complex_buffer(model: Mixture, draw: random.Random) -> None:
    model.images.append(Spectrum())


def expanded_buffer(model: Mixture, draw: random.Random) -> None:
    model.images.append(Expanded(draw.choice([torch.float32, torch.bool, torch.int64])))


def non_persistent_buffer(model: Mixture, draw: random.Random) -> None:
    model.images.append(NonPersistent())


def own_running_statistics(model: Mixture, draw: random.Random) -> None:
    model.features.append(Centred())


# Types and layouts of parameters


class Typed(nn.Module):
    """Layers of another type, between casts."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer.to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.dtype)).to(x.dtype)


class ComplexFilter(nn.Module):
    """A parameter in Fourier space."""

    def __init__(self) -> None:
        super().__init__()
        noise = 0.1 * torch.randn(8, 5, dtype=torch.complex64)
        self.filter = nn.Parameter(1 + noise)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * self.filter, s=(8, 8))


def typed(dtype: torch.dtype) -> Ingredient:
    def add(model: Mixture, draw: random.Random) -> None:
        layer: nn.Module = nn.Sequential(convolution(), nn.GroupNorm(2, WIDTH))
        if draw.random() < 0.3:
            layer = nn.Sequential(convolution(), nn.BatchNorm2d(WIDTH))
        model.images.append(Typed(layer, dtype))

    return add


def complex_parameter(model: Mixture, draw: random.Random) -> None:
    model.images.append(ComplexFilter())


def channels_last(model: Mixture, draw: random.Random) -> None:
    model.images.append(convolution().to(memory_format=torch.channels_last))


def transposed(model: Mixture, draw: random.Random) -> None:
    layer = linear()
    layer.weight = nn.Parameter(torch.randn(FEATURES, FEATURES).mul(0.2).T)
    model.features.append(layer)


# Hooks


class GradientMask(nn.Module):
    """A linear layer whose weight has a hook that keeps the entries `held` as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()
        held = torch.rand(FEATURES, FEATURES) < 0.5
        self.held = held
        self.linear.weight.register_hook(lambda gradient: gradient.masked_fill(held, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Listening(nn.Module):
    """A layer with a forward hook, a closure over self, that stores an inner layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(convolution(), nn.Tanh(), convolution())
        self.layers[1].register_forward_hook(lambda *call: self._hear(call[-1]))

    def _hear(self, output: Tensor) -> None:
        self.heard = output

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.heard


def gradient_mask(model: Mixture, draw: random.Random) -> None:
    model.features.append(GradientMask())


def forward_hook(model: Mixture, draw: random.Random) -> None:
    model.images.append(Listening())


# Ties, and activation checkpointing


class Checkpointed(nn.Module):
    """Activation checkpointing of a layer while it trains."""

    def __init__(self, layer: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.layer = layer
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.layer(x)
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


def tied(how: str) -> Ingredient:
    def add(model: Mixture, draw: random.Random) -> None:
        one, other = linear(), linear()
        other.weight = one.weight
        layers: list[nn.Module] = [one, other]
        if how:
            layers = [Checkpointed(layer, how == "reentrant") for layer in layers]
        model.features.extend(layers)

    return add


def checkpointed(how: str) -> Ingredient:
    def add(model: Mixture, draw: random.Random) -> None:
        layer = nn.Sequential(linear(), nn.LayerNorm(FEATURES))
        model.features.append(Checkpointed(layer, how == "reentrant"))

    return add


# Drops

COINS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "numpy": np.random.rand,
    "python": random.random,
}


class Drop(nn.Module):
    """Stochastic depth: in training, each rank leaves out the branch at random."""

    def __init__(self, layer: nn.Module, coin: str) -> None:
        super().__init__()
        self.layer = layer
        self.coin = coin

    def forward(self, x: Tensor) -> Tensor:
        if self.training and COINS[self.coin]() < 0.5:
            return torch.zeros_like(x)
        return self.layer(x)


def layer_drop(coin: str) -> Ingredient:
    def add(model: Mixture, draw: random.Random) -> None:
        wrap_some_layer(model, draw, lambda layer: Drop(layer, coin))

    return add


def dropout(model: Mixture, draw: random.Random) -> None:
    wrap_some_layer(model, draw, lambda layer: nn.Sequential(nn.Dropout(0.3), layer))


# Unusual parameters


class Gain(nn.Module):
    """One or several parameters without dimensions."""

    def __init__(self, scalars: int) -> None:
        super().__init__()
        self.gains = nn.ParameterList([nn.Parameter(torch.tensor(0.3)) for _ in range(scalars)])

    def forward(self, x: Tensor) -> Tensor:
        return x * sum(self.gains)


class Nothing(nn.Module):
    """A parameter without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.empty(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * x + self.nothing.sum()


def scalar_parameter(model: Mixture, draw: random.Random) -> None:
    model.features.append(Gain(draw.choice([1, 3])))


def empty_parameter(model: Mixture, draw: random.Random) -> None:
    model.features.append(Nothing())


def unused_parameter(model: Mixture, draw: random.Random) -> None:
    model.features.append(Unreached(linear()))


def frozen_parameter(model: Mixture, draw: random.Random) -> None:
    wrap_some_layer(model, draw, lambda layer: layer.requires_grad_(False))


# Extra state


class Notes(nn.Module):
    """Extra state of JSON's types, which nothing changes."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: Any = {"version": 1, "names": ["a", None, True], "inner": {"x": 0.1}}

    def get_extra_state(self) -> Any:
        return self.notes

    def set_extra_state(self, state: Any) -> None:
        self.notes = state

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * x


class Steps(nn.Module):
    """A schedule inside the model: extra state counts the steps, and the output depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def get_extra_state(self) -> Any:
        return {"steps": self.steps}

    def set_extra_state(self, state: Any) -> None:
        self.steps = state["steps"]

    def forward(self, x: Tensor) -> Tensor:
        self.steps += self.training
        return x * min(1.0, 0.1 + self.steps / 10)


class Seen(nn.Module):
    """Extra state that differs between groups: a sum over the samples seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0.0

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += float(x.sum())
        return 0.1 * x


def extra_state(model: Mixture, draw: random.Random) -> None:
    model.features.append(Notes())


def extra_state_counter(model: Mixture, draw: random.Random) -> None:
    model.features.append(Steps())


def extra_state_of_samples(model: Mixture, draw: random.Random) -> None:
    model.features.append(Seen())


INGREDIENTS: dict[str, Ingredient] = {
    "batch_norm_1d": batch_norm_1d,
    "batch_norm_2d": batch_norm_2d,
    "batch_norm_3d": batch_norm_3d,
    "batch_norm_cumulative": batch_norm_cumulative,
    "batch_norm_untracked": batch_norm_untracked,
    "batch_norm_frozen": batch_norm_frozen,
    "batch_norm_twice": batch_norm_twice,
    "batch_norm_unreached": batch_norm_unreached,
    "batch_norm_sync": batch_norm_sync,
    "group_norm": group_norm,
    "layer_norm": layer_norm,
    "instance_norm": instance_norm,
    "instance_norm_running": instance_norm_running,
    "weight_norm_old": weight_norm_old,
    "weight_norm_new": weight_norm_new,
    "spectral_norm_old": spectral_norm_old,
    "spectral_norm_new": spectral_norm_new,
    "orthogonal": orthogonal,
    "own_parametrization": parametrized(Symmetric),
    "own_parametrization_buffer": parametrized(Scaled),
    "own_power_iteration": parametrized(OwnPowerIteration),
    "pruned": pruned,
    "float_table": float_table,
    "float_scalar": float_scalar,
    "infinite_mask": infinite_mask,
    "integer_buffer": integer_buffer,
    "bool_buffer": bool_buffer,
    "complex_buffer": complex_buffer,
    "expanded_buffer": expanded_buffer,
    "non_persistent_buffer": non_persistent_buffer,
    "own_running_statistics": own_running_statistics,
    "float64": typed(torch.float64),
    "float16": typed(torch.float16),
    "bfloat16": typed(torch.bfloat16),
    "complex_parameter": complex_parameter,
    "channels_last": channels_last,
    "transposed": transposed,
    "gradient_mask": gradient_mask,
    "forward_hook": forward_hook,
    "tied": tied(""),
    "tied_checkpoint": tied("non-reentrant"),
    "tied_reentrant": tied("reentrant"),
    "checkpoint": checkpointed("non-reentrant"),
    "checkpoint_reentrant": checkpointed("reentrant"),
    "drop_torch": layer_drop("torch"),
    "drop_numpy": layer_drop("numpy"),
    "drop_python": layer_drop("python"),
    "dropout": dropout,
    "scalar_parameter": scalar_parameter,
    "empty_parameter": empty_parameter,
    "unused_parameter": unused_parameter,
    "frozen_parameter": frozen_parameter,
    "extra_state": extra_state,
    "extra_state_counter": extra_state_counter,
    "extra_state_of_samples": extra_state_of_samples,
}


# Models that must be refused


class Copies(Mixture):
    """A model whose state dict holds copies: writing to them does not change the model."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {name: tensor.clone() for name, tensor in state.items()}


class Opinion:
    """An object that cannot be loaded without running code."""


class Opinionated(Mixture):
    def get_extra_state(self) -> Any:
        return Opinion()

    def set_extra_state(self, state: Any) -> None:
        assert isinstance(state, Opinion)


class Sparse(Mixture):
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__(classes, channels)
        self.table = nn.Embedding(8, classes, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        where = x.mean(dim=(1, 2, 3)).mul(4).long().clamp(-4, 3) + 4
        return super().forward(x) + self.table(where)


class Raising(Mixture):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("an image of 32 pixels is needed")


def scripted(classes: int, channels: int) -> nn.Module:
    layers = nn.Conv2d(channels, WIDTH, 8), nn.Flatten(), nn.Linear(WIDTH, classes)
    return torch.jit.script(nn.Sequential(*layers))


def lazy(classes: int, channels: int) -> nn.Module:
    model = Mixture(classes, channels)
    model.features.append(nn.LazyLinear(FEATURES))
    return model


_calls = itertools.count()


def restless(classes: int, channels: int) -> nn.Module:
    """A builder that numbers its layers over all calls."""
    model = Mixture(classes, channels)
    model.add_module(f"layer_{next(_calls)}", linear())
    return model


@dataclass(frozen=True)
class Refusal:
    build: Callable[[int, int], nn.Module]
    cause: str  # regular expression that the refusal's line has to match; case is ignored


REFUSED: dict[str, Refusal] = {
    "scripted": Refusal(scripted, r"script"),
    "lazy": Refusal(lazy, r"lazy|uninitiali[sz]ed"),
    "state_dict_copies": Refusal(Copies, r"state_dict|cop(y|ies)"),
    "extra_state_object": Refusal(Opinionated, r"extra.state"),
    "builder_restless": Refusal(restless, r"layer_|twice|again|each time|builder|other"),
    "sparse_gradient": Refusal(Sparse, r"sparse"),
    "forward_raises": Refusal(Raising, r"an image of 32 pixels is needed"),
}


# A seed's model


def ingredients(seed: int, only: str = "") -> tuple[str, ...]:
    """Return the ingredients of a seed's model, or those in `only`, separated by commas."""
    if only:
        return tuple(only.split(","))
    number, place = divmod(seed, ROUND)
    deck = random.Random(f"deck {number}")
    mixtures = ROUND - len(REFUSED)
    # The ingredients are dealt out to the round's models like cards; refusals are hands of one.
    cards = deck.sample(list(INGREDIENTS), len(INGREDIENTS))
    hands = [tuple(cards[i::mixtures]) for i in range(mixtures)] + [(name,) for name in REFUSED]
    deck.shuffle(hands)
    hand = hands[place]
    if hand[0] in REFUSED:
        return hand
    more = random.Random(f"more {seed}")
    rest = [name for name in INGREDIENTS if name not in hand]
    return *hand, *more.sample(rest, more.randrange(3))


def build(classes: int, channels: int, seed: int, only: str = "") -> nn.Module:
    """Build a seed's model, with values from torch's generator."""
    names = ingredients(seed, only)
    if names[0] in REFUSED:
        return REFUSED[names[0]].build(classes, channels)
    model = Mixture(classes, channels)
    for name in names:
        INGREDIENTS[name](model, random.Random(f"{name} {seed}"))
    return model
