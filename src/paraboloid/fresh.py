"""Fresh memory for large results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LARGE_BYTES = 16 * 2**20


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fresh memory: an elementwise product where the inner axis has length one."""
    multiply = torch.mul if left.shape[-1] == 1 else torch.matmul
    if torch.is_grad_enabled():
        return multiply(left, right)
    shape = (*torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-1])
    return multiply(left, right, out=empty(shape, left))


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of the type and on the device of `like`, in large pages where it is large and on a CPU.

    The first touch of every 4 KiB page costs more than the numbers written to it.  Linux gives pages of 2 MiB to those
    who ask for them; NumPy's allocator does, torch's does not by default.
    """
    size = torch.Size(shape).numel() * like.element_size()
    if like.device.type != "cpu" or size < LARGE_BYTES:
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(size, np.uint8)).view(like.dtype).view(tuple(shape))
