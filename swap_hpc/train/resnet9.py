"""ResNet-9, the network of the paper's CIFAR experiments."""

from torch import Tensor, nn


class ResNet9(nn.Module):
    """ResNet-9 of D. Page, "How to train your ResNet" (cifar10-fast, 2018).

    Takes images (n, channels, H, W) of 8x8 pixels or more and returns logits (n, classes). The
    shapes in the comments are for 32x32 pixels.

    Args:
        classes: Number of logits.
        channels: Channels of an image.
        width: Channels of the first layer; the paper's network has 64.

    Raises:
        ValueError: `width` is less than 1.
    """

    def __init__(self, classes: int, channels: int = 3, width: int = 64):
        super().__init__()
        if width < 1:
            raise ValueError(f"width = {width}, but it needs at least one channel")
        w = width
        # (n, w, 32, 32)
        self.prep = _convolution(channels, w)
        # (n, 2w, 16, 16)
        self.layer1 = nn.Sequential(_convolution(w, 2 * w), nn.MaxPool2d(2), _Residual(2 * w))
        # (n, 4w, 8, 8)
        self.layer2 = nn.Sequential(_convolution(2 * w, 4 * w), nn.MaxPool2d(2))
        # (n, 8w, 4, 4)
        self.layer3 = nn.Sequential(_convolution(4 * w, 8 * w), nn.MaxPool2d(2), _Residual(8 * w))
        self.linear = nn.Linear(8 * w, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))
        features = x.amax(dim=(2, 3))
        return self.linear(features) * 0.125  # the scale of the logits in cifar10-fast


def _convolution(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class _Residual(nn.Module):
    """Two convolutions, whose output is added to their input."""

    def __init__(self, channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            _convolution(channels, channels), _convolution(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)
