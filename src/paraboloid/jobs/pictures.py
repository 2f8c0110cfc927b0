"""Inputs as images for a page."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

LARGEST = 64  # side of an image that is shown
SMALLEST = 4


def picture(x: Tensor, vectors: bool = False) -> list[Any] | None:
    """Grey [H, W] or coloured [H, W, 3] values 0..255, scaled to the image's own range; None for what is no image.

    vectors  whether a vector whose length is a square number, [64] say, is an image row by row
    """
    side = math.isqrt(x.numel())
    if vectors and x.dim() == 1 and side * side == x.numel():
        x = x.view(side, side)
    if not x.is_floating_point() or x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[0] not in (1, 3)):
        return None
    if min(x.shape[-2:]) < SMALLEST or max(x.shape[-2:]) > LARGEST:
        return None
    x = x.detach().double()
    low, high = x.min(), x.max()
    x = ((x - low) / (high - low).clamp(min=1e-12) * 255).round().int()
    if x.dim() == 3:
        x = x[0] if len(x) == 1 else x.movedim(0, 2)
    return x.tolist()
