"""A small U-Net: the network whose structure is the prior of the deep image prior."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 4  # of the normalisation
LEAST = 4  # pixels along a side, of three resolutions
MARGIN = 0.01  # how near to its bounds the output is at first, relative: at a bound itself nothing moves it


class Block(nn.Module):
    """Two convolutions of 3 x 3, each normalised in groups of channels, then leaky ReLU; dropout of channels after."""

    def __init__(self, takes: int, gives: int, dropout: float = 0.0, copies: int = 1):
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv1, self.norm1 = _conv(takes, gives, 3, copies), nn.GroupNorm(copies * GROUPS, copies * gives)
        self.conv2, self.norm2 = _conv(gives, gives, 3, copies), nn.GroupNorm(copies * GROUPS, copies * gives)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm1(self.conv1(x)), 0.2)
        return self.dropout(F.leaky_relu(self.norm2(self.conv2(x)), 0.2))


def _conv(takes: int, gives: int, size: int, copies: int) -> nn.Conv2d:
    """`copies` convolutions side by side."""
    return nn.Conv2d(copies * takes, copies * gives, size, padding=size // 2, groups=copies)


class UNet(nn.Module):
    """Images [N, C, H, W] to images [N, *lead, H, W] with values between low and high.

    `scales` resolutions, each half the one before; bilinear on the way up, with 1 x 1 convolutions to `skip` channels
    across.  The output is low + (high - low) sigmoid(h), or scale h where a bound is infinite; at first it lies around
    `level`.  copies=K is K networks side by side, each of its own channels: [N, K C, H, W] to h, [N, K, *lead, H, W].
    """

    def __init__(
        self, takes: int, lead: tuple[int, ...], bounds: tuple[float, float], scale: float = 1.0, level: float = 0.0,
        channels: int = 16, scales: int = 3, skip: int = 4, dropout: float = 0.0, copies: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.lead, self.bounds, self.scale, self.copies = lead, bounds, scale, copies
        many = 1 if copies is None else copies
        self.first = Block(takes, channels, dropout, many)
        self.down = nn.ModuleList(Block(channels, channels, dropout, many) for _ in range(scales - 1))
        self.across = nn.ModuleList(_conv(channels, skip, 1, many) for _ in range(scales - 1))
        self.up = nn.ModuleList(Block(channels + skip, channels, dropout, many) for _ in range(scales - 1))
        self.last = _conv(channels, torch.Size(lead).numel(), 3, many)
        with torch.no_grad():
            self.last.bias.fill_(self.before(level))  # pyright: ignore[reportOptionalMemberAccess]

    def forward(self, z: Tensor) -> Tensor:
        x, passed = self.first(z), []
        for down in self.down:
            passed.append(x)
            x = down(F.avg_pool2d(x, 2))
        for up, across, fine in zip(self.up, self.across, reversed(passed), strict=True):
            x = F.interpolate(x, size=fine.shape[-2:], mode="bilinear", align_corners=False)
            x = up(self._beside(x, across(fine)))
        h = self.last(x)
        if self.copies is not None:
            return h.reshape(len(z), self.copies, *self.lead, *z.shape[-2:])
        return self.image(h.reshape(len(z), *self.lead, *z.shape[-2:]))

    def image(self, h: Tensor) -> Tensor:
        """Between the bounds."""
        low, high = self.bounds
        return low + (high - low) * torch.sigmoid(h) if self.bounded else self.scale * h

    def _beside(self, x: Tensor, y: Tensor) -> Tensor:
        """The channels of x and then those of y, of every copy."""
        if self.copies is None:
            return torch.cat([x, y], 1)
        apart = [t.unflatten(1, (self.copies, -1)) for t in (x, y)]
        return torch.cat(apart, 2).flatten(1, 2)

    @property
    def bounded(self) -> bool:
        return all(math.isfinite(bound) for bound in self.bounds)

    def before(self, value: float) -> float:
        """The h that the output `value` comes from, not too near to a bound."""
        if not self.bounded:
            return value / self.scale
        low, high = self.bounds
        share = min(max((value - low) / (high - low), MARGIN), 1 - MARGIN)
        return math.log(share / (1 - share))
