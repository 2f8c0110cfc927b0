"""Networks of the image problems: All-CNN-C, Wide ResNet, and ResNets for small and for large images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def all_cnn_c(classes: int = 100) -> nn.Module:
    """All-CNN-C for images of 32x32 pixels, without dropout: 1,387,108 parameters for 100 classes.

    Source: Springenberg et al. 2015, arXiv:1412.6806, table 1.
    """
    layers: list[nn.Module] = []
    for c, d, kernel, stride, padding in [
        (3, 96, 3, 1, 1), (96, 96, 3, 1, 1), (96, 96, 3, 2, 1), (96, 192, 3, 1, 1), (192, 192, 3, 1, 1),
        (192, 192, 3, 2, 1), (192, 192, 3, 1, 0), (192, 192, 1, 1, 0),
    ]:  # fmt: skip
        layers += [nn.Conv2d(c, d, kernel, stride, padding), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(192, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class PreActivation(nn.Module):
    """Wide ResNet's block: norm, ReLU and convolution twice, around a shortcut."""

    def __init__(self, c: int, d: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c), nn.Conv2d(c, d, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(d), nn.Conv2d(d, d, 3, 1, 1, bias=False)
        self.shortcut = None if c == d and stride == 1 else nn.Conv2d(c, d, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        around = x if self.shortcut is None else self.shortcut(h)
        return around + self.conv2(F.relu(self.norm2(self.conv1(h))))


def wide_resnet(depth: int = 40, width: int = 4, classes: int = 100) -> nn.Module:
    """WRN-depth-width without dropout; depth is 6 n + 4.  Source: Zagoruyko & Komodakis 2016, arXiv:1605.07146."""
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth is {depth}; expected 6 n + 4 with n >= 1: 10, 16, 22, 28, 34, 40, ...")
    blocks: list[nn.Module] = []
    channels = [16, 16 * width, 32 * width, 64 * width]
    for group in range(3):
        for i in range((depth - 4) // 6):
            first = i == 0
            blocks.append(PreActivation(
                channels[group] if first else channels[group + 1], channels[group + 1], 2 if first and group else 1
            ))  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), *blocks, nn.BatchNorm2d(channels[3]), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[3], classes),
    )  # fmt: skip


class Residual(nn.Module):
    """ResNet's block of two convolutions; the shortcut changes shape by a 1x1 convolution where it must."""

    def __init__(self, c: int, d: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(c, d, 3, stride, 1, bias=False), nn.BatchNorm2d(d)
        self.conv2, self.norm2 = nn.Conv2d(d, d, 3, 1, 1, bias=False), nn.BatchNorm2d(d)
        self.shortcut = None
        if c != d or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(c, d, 1, stride, bias=False), nn.BatchNorm2d(d))

    def forward(self, x: Tensor) -> Tensor:
        around = x if self.shortcut is None else self.shortcut(x)
        return F.relu(around + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def small_resnet(depth: int, classes: int = 10) -> nn.Module:
    """ResNet for images of 32x32 pixels; depth is 6 n + 2: 8, 20, 32, ...  Source: He et al. 2016, arXiv:1512.03385,
    section 4.2 (with 1x1 convolutions in place of zero padding)."""
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth is {depth}; expected 6 n + 2 with n >= 1: 8, 14, 20, 26, 32, ...")
    blocks = _blocks([16, 16, 32, 64], (depth - 2) // 6)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip


def resnet18(classes: int = 1000) -> nn.Module:
    """ResNet-18 with the stem for large images.  Source: He et al. 2016, arXiv:1512.03385, table 1."""
    blocks = _blocks([64, 64, 128, 256, 512], 2)
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes),
    )  # fmt: skip


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions, of which the second, 3x3, has a quarter of the channels and the stride."""

    def __init__(self, c: int, d: int, stride: int):
        super().__init__()
        inner = d // 4
        self.conv1, self.norm1 = nn.Conv2d(c, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, d, 1, bias=False), nn.BatchNorm2d(d)
        self.shortcut = None
        if c != d or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(c, d, 1, stride, bias=False), nn.BatchNorm2d(d))

    def forward(self, x: Tensor) -> Tensor:
        around = x if self.shortcut is None else self.shortcut(x)
        h = F.relu(self.norm1(self.conv1(x)))
        h = F.relu(self.norm2(self.conv2(h)))
        return F.relu(around + self.norm3(self.conv3(h)))


def resnet50(classes: int = 1000) -> nn.Module:
    """ResNet-50 with the stem for large images: 25,557,032 parameters for 1000 classes.  Source: He et al. 2016,
    arXiv:1512.03385, table 1, with the stride of a stage in its first 3x3 convolution, as is usual now."""
    blocks: list[nn.Module] = []
    for group, (count, d) in enumerate(zip([3, 4, 6, 3], [256, 512, 1024, 2048], strict=True)):
        for i in range(count):
            c = d if i else (d // 2 if group else 64)
            blocks.append(Bottleneck(c, d, 2 if i == 0 and group else 1))
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, classes),
    )  # fmt: skip


def _blocks(channels: list[int], each: int) -> list[nn.Module]:
    found: list[nn.Module] = []
    for group in range(len(channels) - 1):
        for i in range(each):
            c = channels[group] if i == 0 else channels[group + 1]
            found.append(Residual(c, channels[group + 1], 2 if i == 0 and group else 1))
    return found
