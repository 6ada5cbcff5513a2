"""The network of the paper's CIFAR experiments."""

from torch import Tensor, nn


class ResNet9(nn.Module):
    """The ResNet-9 of D. Page, "How to train your ResNet" (cifar10-fast, 2018), for images of 8x8 and larger.

    `width`: channels of the first layer; the paper's network has 64. Sizes of 32x32 inputs are given below.
    """

    def __init__(self, classes: int, channels: int = 3, width: int = 64):
        super().__init__()
        if width < 1:
            raise ValueError(f"width = {width}, but it needs at least one channel")
        w = width
        self.prep = _convolution(channels, w)  # (n, w, 32, 32)
        self.layer1 = nn.Sequential(
            _convolution(w, 2 * w), nn.MaxPool2d(2), _Residual(2 * w)
        )  # (n, 2w, 16, 16)
        self.layer2 = nn.Sequential(_convolution(2 * w, 4 * w), nn.MaxPool2d(2))  # (n, 4w, 8, 8)
        self.layer3 = nn.Sequential(
            _convolution(4 * w, 8 * w), nn.MaxPool2d(2), _Residual(8 * w)
        )  # (n, 8w, 4, 4)
        self.linear = nn.Linear(8 * w, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))
        return self.linear(x.amax(dim=(2, 3))) * 0.125


def _convolution(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(channels, channels), _convolution(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)
