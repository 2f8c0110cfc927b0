"""Buffers for tiles of a kernel matrix, used again and again: fresh memory costs more than what is computed in it."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffers:
    """Uninitialised matrices of at most `size` elements; `give` one back to have it handed out again, to any thread."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device):
        self.size, self.dtype, self.device = size, dtype, device
        self.free: list[Tensor] = []

    def take(self, rows: int, columns: int) -> Tensor:
        """[rows, columns], each row contiguous."""
        try:
            flat = self.free.pop()
        except IndexError:  # asking first would leave time for another thread
            flat = torch.empty(self.size, dtype=self.dtype, device=self.device)
        if rows * columns > len(flat):
            flat = flat.new_empty(rows * columns)
        return flat[: rows * columns].view(rows, columns)

    def give(self, tile: Tensor) -> None:
        """What was taken is not needed any more."""
        whole = tile.new_empty(0).set_(tile.untyped_storage())  # the buffer that the tile is the head of
        self.free.append(whole)


class Placed:
    """Buffers whose first matrix of that shape is `out`, where a tile shall stay: kernels take their result first."""

    def __init__(self, buffers: Buffers, out: Tensor):
        self.buffers, self.out, self.free = buffers, out, True

    def take(self, rows: int, columns: int) -> Tensor:
        if self.free and self.out.shape == (rows, columns):
            self.free = False
            return self.out
        return self.buffers.take(rows, columns)

    def give(self, tile: Tensor) -> None:
        if tile.data_ptr() != self.out.data_ptr():
            self.buffers.give(tile)
