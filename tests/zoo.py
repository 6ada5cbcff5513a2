"""Small models of the kinds that users have: (n, channels, H, W) -> (n, classes)."""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

Split = tuple[np.ndarray, np.ndarray]


def data(path: Path) -> tuple[Split, Split]:
    """Return images (8, 8, 3) of three classes, which differ in brightness."""
    generator = np.random.Generator(np.random.Philox(7))

    def split(samples: int) -> Split:
        labels = generator.integers(0, 3, samples)
        noise = generator.integers(0, 120, (samples, 8, 8, 3))
        return (noise + 60 * labels[:, None, None, None]).astype(np.uint8), labels

    return split(96), split(24)


class Net(nn.Module):
    """A convolution, batch norm and a linear layer, for images of 8x8."""

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Linear(96, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        return self.body(images).flatten(1)


def swin_v2(classes: int, channels: int) -> nn.Module:
    """Return torchvision's Swin v2: stochastic depth, and tables of positions as 3-d buffers."""
    from torchvision.models.swin_transformer import (
        PatchMergingV2,
        SwinTransformer,
        SwinTransformerBlockV2,
    )

    return SwinTransformer(
        patch_size=[1, 1],
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        window_size=[4, 4],
        stochastic_depth_prob=0.3,
        num_classes=classes,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )


def densenet(classes: int, channels: int) -> nn.Module:
    """Return torchvision's DenseNet with memory-efficient checkpointing."""
    from torchvision.models import DenseNet

    return DenseNet(4, (2, 2), 8, num_classes=classes, memory_efficient=True)


def old_weight_norm(classes: int, channels: int) -> nn.Module:
    net = Net(classes, channels)
    net.head = nn.utils.weight_norm(net.head)
    return net


def pruned(classes: int, channels: int) -> nn.Module:
    net = Net(classes, channels)
    prune.l1_unstructured(net.head, "weight", 0.5)
    return net


class Frozen(Net):
    """A network whose batch norm keeps its statistics, as in fine-tuning."""

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.body[1].eval()
        return self


def frozen_batch_norm(classes: int, channels: int) -> nn.Module:
    net = Frozen(classes, channels)
    net.body[1].running_mean.fill_(0.2)  # type: ignore[operator]
    net.body[1].running_var.fill_(4.0)  # type: ignore[operator]
    return net


def gradient_mask(classes: int, channels: int) -> nn.Module:
    """Return a network of whose classifier half the weights keep their initial values."""
    net = Net(classes, channels)
    mask = torch.ones_like(net.head.weight)
    mask[:, :48] = 0
    net.head.weight.register_hook(lambda gradient: gradient * mask)
    return net


class Dropping(Net):
    """A network that leaves out whole layers at random, on each rank for itself."""

    def __init__(self, classes: int, channels: int, coin: str):
        super().__init__(classes, channels)
        self.extra = nn.ModuleList([nn.Linear(96, 96) for _ in range(4)])
        self.never = nn.Linear(96, 96)
        coins = {"torch": lambda: float(torch.rand(())), "numpy": np.random.rand}
        self.coin = coins.get(coin, random.random)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)
        for layer in self.extra:
            if not self.training or self.coin() > 0.5:
                x = x + 0.1 * layer(x)
        return self.head(x)


def dropping(classes: int, channels: int, coin: str = "torch") -> nn.Module:
    return Dropping(classes, channels, coin)


class Complex(Net):
    """A network with a complex parameter: a filter in Fourier space."""

    def __init__(self, classes: int, channels: int):
        super().__init__(classes, channels)
        self.filter = nn.Parameter(1 + 0.1 * torch.randn(8, 5, dtype=torch.cfloat))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(torch.fft.irfft2(torch.fft.rfft2(images) * self.filter))


class Seeing(Net):
    """A network whose extra state is a sum that differs between ranks."""

    def __init__(self, classes: int, channels: int):
        super().__init__(classes, channels)
        self.seen = 0.0

    def features(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen += float(images.mean())
        return super().features(images)

    def get_extra_state(self) -> float:
        return self.seen

    def set_extra_state(self, state: float) -> None:
        self.seen = state


class Spectral(Net):
    """A network with spectral norm: torch's parametrization, or the old hooks."""

    def __init__(self, classes: int, channels: int, old: bool = False):
        super().__init__(classes, channels)
        norm = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
        self.layers = nn.ModuleList([norm(nn.Linear(96, 96)) for _ in range(2)])

    def features(self, images: Tensor) -> Tensor:
        x = super().features(images)
        for layer in self.layers:
            x = x + F.relu(layer(x))
        return x


class Rechecked(Net):
    """A layer used twice under reentrant checkpointing: its gradient arrives in two parts."""

    def __init__(self, classes: int, channels: int):
        super().__init__(classes, channels)
        self.twice = nn.Linear(96, 96)

    def features(self, images: Tensor) -> Tensor:
        x = super().features(images)
        for _ in range(2):
            x = checkpoint(lambda x: torch.tanh(self.twice(x)), x, use_reentrant=True)
        return x


def mixing_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of mixed labels; numpy and Python draw the shares."""
    share = np.random.beta(0.4, 0.4) * random.random()
    mixed = F.cross_entropy(outputs, targets.roll(1))
    return (1 - share) * F.cross_entropy(outputs, targets) + share * mixed


def spiky_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy, in some steps of some ranks so large that float16 overflows."""
    spike = 1e6 if torch.rand(()) < 0.06 else 1.0
    return spike * F.cross_entropy(outputs, targets)


def huge_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return a loss whose gradients overflow float16 at any scale."""
    return 1e12 * F.cross_entropy(outputs, targets)
