"""Kernel matrices as operators: tiles are formed in the cache, used, and forgotten, or kept where they fit."""

from __future__ import annotations

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

    def __init__(self, kernel: Kernel, x: Tensor, noise: Tensor, max_memory: int | None = None):
        self.kernel, self.noise, self.shift = kernel, noise, x.mean(0)
        self.points = [t.contiguous() for t in kernel.points(x, self.shift)]
        self.shape, self.dtype, self.device = (len(x), len(x)), x.dtype, x.device
        self.diagonal = kernel.diagonal(x)
        self.buffers = Buffers(ROWS * COLUMNS, x.dtype, x.device)
        self.budget = KERNEL_TILES.default if max_memory is None else max_memory
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.evaluated = 0  # entries of the matrix that were formed so far

    def without_noise(self) -> Gram:
        """K(x, x) alone, sharing everything else."""
        other = object.__new__(Gram)
        other.__dict__.update(self.__dict__)
        other.noise = torch.zeros_like(self.noise)
        return other

    def __matmul__(self, v: Tensor) -> Tensor:
        N, rows = self.shape[0], _rows(v)
        out = (rows * self.noise).contiguous()
        for i in range(0, N, ROWS):
            here = slice(i, min(i + ROWS, N))
            for j in range(0, i + 1, COLUMNS):
                there = slice(j, min(j + COLUMNS, N))
                tile = self._tile(here, there)
                out[:, here].addmm_(rows[:, there], tile.T)
                if j != i:
                    out[:, there].addmm_(rows[:, here], tile)
                self._release(tile, (i, j))
        return out.T if v.dim() == 2 else out[0]

    def rows(self, indices: Tensor, v: Tensor) -> Tensor:
        """(K + diag(noise))[indices] @ v, [B, S]."""
        out = self._product([t[indices] for t in self.points], _rows(v))
        noise = self.noise if self.noise.dim() == 0 else self.noise[indices]
        return out.add_(_rows(v)[:, indices] * noise).T

    def block(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The entries of K + diag(noise) at these rows and columns, [B, C]."""
        out = self.points[0].new_empty(len(rows), len(columns))
        left = [t[rows] for t in self.points]
        right = [t[columns] for t in self.points]
        for i in range(0, len(rows), ROWS):
            for j in range(0, len(columns), COLUMNS):
                here, there = slice(i, i + ROWS), slice(j, j + COLUMNS)
                tile = self._formed([t[here] for t in left], [t[there] for t in right])
                same = (rows[here].unsqueeze(1) == columns[there]).nonzero(as_tuple=True)
                which = rows[here][same[0]]
                tile[same] = self.diagonal[which] + (self.noise if self.noise.dim() == 0 else self.noise[which])
                out[here, there] = tile
                self.buffers.give(tile)
        return out

    def cross(self, x: Tensor, v: Tensor) -> Tensor:
        """K(x, X) @ v for other inputs x [M, d], [M, S]."""
        return self._product([t.contiguous() for t in self.kernel.points(x, self.shift)], _rows(v)).T

    def cross_matrix(self, x: Tensor) -> Tensor:
        """K(x, X) for other inputs x [M, d], [M, N]."""
        left = self.kernel.points(x, self.shift)
        out = x.new_empty(len(x), self.shape[0])
        for i in range(0, len(x), ROWS):
            mine = [t[i : i + ROWS] for t in left]
            for j in range(0, self.shape[0], COLUMNS):
                tile = self._formed(mine, [t[j : j + COLUMNS] for t in self.points])
                out[i : i + ROWS, j : j + COLUMNS] = tile
                self.buffers.give(tile)
        return out

    def dense(self) -> Tensor:
        """[N, N], for those who factorise it."""
        N = self.shape[0]
        out = pooled((N, N), self.points[0])
        for i in range(0, N, ROWS):
            for j in range(0, i + 1, COLUMNS):
                here, there = slice(i, min(i + ROWS, N)), slice(j, min(j + COLUMNS, N))
                tile = self._tile(here, there)
                out[here, there] = tile
                if j != i:
                    out[there, here] = tile.T
                self._release(tile, (i, j))
        out.diagonal().add_(self.noise)
        return out

    def _product(self, left: list[Tensor], rows: Tensor) -> Tensor:
        """[S, B]: each column does not depend on the other inputs in `left`."""
        N, B = self.shape[0], len(left[0])
        out = rows.new_zeros(len(rows), B)
        for i in range(0, B, ROWS):
            here = slice(i, min(i + ROWS, B))
            mine = [t[here] for t in left]
            for j in range(0, N, COLUMNS):
                there = slice(j, min(j + COLUMNS, N))
                tile = self._formed(mine, [t[there] for t in self.points])
                out[:, here].addmm_(rows[:, there], tile.T)
                self.buffers.give(tile)
        return out

    def _tile(self, here: slice, there: slice) -> Tensor:
        place = here.start, there.start
        if place in self.kept:
            return self.kept[place]
        tile = self._formed([t[here] for t in self.points], [t[there] for t in self.points])
        if here == there:  # distances of 0 may have been rounded
            tile.diagonal().copy_(self.diagonal[here])
        return tile

    def _release(self, tile: Tensor, place: tuple[int, int]) -> None:
        if place in self.kept:
            return
        if tile.nbytes <= self.budget:
            self.budget -= tile.nbytes
            self.kept[place] = tile
        else:
            self.buffers.give(tile)

    def _formed(self, left: list[Tensor], right: list[Tensor]) -> Tensor:
        self.evaluated += len(left[0]) * len(right[0])
        return self.kernel.tile(left, right, self.buffers)


def _rows(v: Tensor) -> Tensor:
    """[N] or [N, S] as contiguous [S, N]."""
    return (v.T if v.dim() == 2 else v.unsqueeze(0)).contiguous()
