"""Kernel matrices as operators: tiles are formed in the cache, used, and forgotten, or kept where they fit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from paraboloid.gp.buffers import Buffers
from paraboloid.gp.kernel import Kernel
from paraboloid.passes.memory import KERNEL_TILES, pooled

ROWS, COLUMNS = 512, 512  # of a tile: 1 MiB in float32, which stays in the cache of one core


class Gram:
    """K(x, x) + diag(noise) as an operator on vectors [N] or [N, S], with rows by index (`linalg.row_blocks`).

    Memory is that of x, of the vectors and of a few tiles; tiles of the lower triangle are kept from product to product
    as far as `max_memory` bytes hold them.  A product with all of it forms each tile once and uses it for both of its
    places.  noise is a number or a vector [N].
    """

    def __init__(
        self, kernel: Kernel, x: Tensor, noise: Tensor, max_memory: int | None = None, shift: Tensor | None = None
    ):
        self.kernel, self.noise, self.shift = kernel, noise, x.mean(0) if shift is None else shift
        self.max_memory = max_memory
        self.points = [t.contiguous() for t in kernel.points(x, self.shift)]
        self.shape, self.dtype, self.device = (len(x), len(x)), x.dtype, x.device
        self.diagonal = kernel.diagonal(x)
        self.buffers = Buffers(ROWS * COLUMNS, x.dtype, x.device)
        self.budget = KERNEL_TILES.default if max_memory is None else max_memory
        self.kept: dict[int, Tensor] = {}  # first row -> rows up to the diagonal
        self.evaluated = 0  # entries of the matrix that were formed so far

    def without_noise(self) -> Gram:
        """K(x, x) alone, sharing everything else."""
        other = object.__new__(Gram)
        other.__dict__.update(self.__dict__)
        other.noise = torch.zeros_like(self.noise)
        return other

    def take_over(self, old: Gram) -> None:
        """The tiles that `old`, of the first of these inputs and with the same shift, has kept."""
        for start, panel in old.kept.items():
            if panel.shape[0] == ROWS and panel.nbytes <= self.budget:  # the last one may have grown
                self.kept[start] = panel
                self.budget -= panel.nbytes

    def __matmul__(self, v: Tensor) -> Tensor:
        N, rows = self.shape[0], _rows(v)
        out = (rows * self.noise).contiguous()
        for i in range(0, N, ROWS):
            here = slice(i, min(i + ROWS, N))
            for there, tile in self._lower(here):
                _add_product(out[:, here], rows[:, there], tile.T)
                below = min(there.stop, i)  # what lies left of the diagonal stands for its transpose too
                if below > there.start:
                    _add_product(out[:, there.start : below], rows[:, here], tile[:, : below - there.start])
        return out.T if v.dim() == 2 else out[0]

    def rows(self, indices: Tensor, v: Tensor) -> Tensor:
        """(K + diag(noise))[indices] @ v, [B, S]."""
        out = self._product([t[indices] for t in self.points], _rows(v))
        noise = self.noise if self.noise.dim() == 0 else self.noise[indices]
        return out.add_(_rows(v)[:, indices] * noise).T

    def block(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """The entries of K + diag(noise) at these rows and columns (all), [B, C]."""
        left = [t[rows] for t in self.points]
        right = self.points if columns is None else [t[columns] for t in self.points]
        out = self._filled(left, right)
        if columns is None:
            same = torch.arange(len(rows), device=self.device), rows
        else:
            same = (rows.unsqueeze(1) == columns).nonzero(as_tuple=True)
        which = rows[same[0]]
        out[same] = self.diagonal[which] + (self.noise if self.noise.dim() == 0 else self.noise[which])
        return out

    def cross(self, x: Tensor, v: Tensor) -> Tensor:
        """K(x, X) @ v for other inputs x [M, d], [M, S]."""
        return self._product([t.contiguous() for t in self.kernel.points(x, self.shift)], _rows(v)).T

    def cross_matrix(self, x: Tensor) -> Tensor:
        """K(x, X) for other inputs x [M, d], [M, N]."""
        return self._filled(self.kernel.points(x, self.shift), self.points)

    def dense(self) -> Tensor:
        """[N, N], for those who factorise it."""
        N = self.shape[0]
        out = pooled((N, N), self.points[0])
        for i in range(0, N, ROWS):
            here = slice(i, min(i + ROWS, N))
            for there, tile in self._lower(here):
                out[here, there] = tile
                out[there, here] = tile.T
        out.diagonal().add_(self.noise)
        return out

    def _filled(self, left: list[Tensor], right: list[Tensor]) -> Tensor:
        B, C = len(left[0]), len(right[0])
        out, width = left[0].new_empty(B, C), _width(B)
        for i in range(0, B, ROWS):
            for j in range(0, C, width):
                tile = self._formed([t[i : i + ROWS] for t in left], [t[j : j + width] for t in right])
                out[i : i + ROWS, j : j + width] = tile
                self.buffers.give(tile)
        return out

    def _product(self, left: list[Tensor], rows: Tensor) -> Tensor:
        """[S, B]: each column does not depend on the other inputs in `left`."""
        N, B = self.shape[0], len(left[0])
        out, width = rows.new_zeros(len(rows), B), _width(B)
        for i in range(0, B, ROWS):
            here = slice(i, min(i + ROWS, B))
            mine = [t[here] for t in left]
            for j in range(0, N, width):
                there = slice(j, min(j + width, N))
                tile = self._formed(mine, [t[there] for t in self.points])
                _add_product(out[:, here], rows[:, there], tile.T)
                self.buffers.give(tile)
        return out

    def _lower(self, here: slice) -> Iterator[tuple[slice, Tensor]]:
        """The rows `here` of K up to the diagonal, in pieces: columns and values; one piece where they are kept."""
        panel = self.kept.get(here.start)
        if panel is not None:
            yield slice(0, here.stop), panel
            return
        size = (here.stop - here.start) * here.stop * self.dtype.itemsize
        if size <= self.budget:
            self.budget -= size
            panel = pooled((here.stop - here.start, here.stop), self.points[0])
        left = [t[here] for t in self.points]
        for j in range(0, here.stop, COLUMNS):
            there = slice(j, min(j + COLUMNS, here.stop))
            tile = self._formed(left, [t[there] for t in self.points])
            if j == here.start:  # distances of 0 may have been rounded
                tile.diagonal().copy_(self.diagonal[here])
            if panel is not None:
                panel[:, there] = tile
            yield there, tile
            self.buffers.give(tile)
        if panel is not None:
            self.kept[here.start] = panel

    def _formed(self, left: list[Tensor], right: list[Tensor]) -> Tensor:
        self.evaluated += len(left[0]) * len(right[0])
        return self.kernel.tile(left, right, self.buffers)


def _width(rows: int) -> int:
    """Of a tile of so many rows."""
    return COLUMNS * max(1, ROWS // max(1, rows))


def _add_product(out: Tensor, rows: Tensor, tile: Tensor) -> None:
    """out += rows @ tile."""
    if len(rows) == 1:
        out[0].addmv_(tile.T, rows[0])
    else:
        out.addmm_(rows, tile)


def _rows(v: Tensor) -> Tensor:
    """[N] or [N, S] as contiguous [S, N]."""
    return (v.T if v.dim() == 2 else v.unsqueeze(0)).contiguous()
