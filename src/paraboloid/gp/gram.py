"""Kernel matrices as operators: tiles are formed in the cache, used, and forgotten, or kept where they fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paraboloid.gp.buffers import Buffers, Placed
from paraboloid.gp.kernel import Kernel
from paraboloid.linalg import lower_triangle
from paraboloid.linalg.threads import side_by_side, workers
from paraboloid.passes.memory import KERNEL_POOLED, KERNEL_TILES, pooled

ROWS, COLUMNS = 512, 512  # of a tile: 1 MiB in float32, which stays in the cache of one core
FEW = 2  # threads with tiles of their own that are no faster than one which reads each entry once
Use = Callable[[int, slice, slice, Tensor], None]  # of a tile: worker, rows, columns, values


class Gram:
    """K(x, x) + diag(noise) as an operator on vectors [N] or [N, S], with rows by index (`linalg.row_blocks`).

    Memory is that of x, of the vectors and of a few tiles; tiles of the lower triangle are kept from product to product
    as far as `max_memory` bytes hold them, as parts of one square where it holds that.  A product with all of it forms
    each tile once and uses it for both of its places.  Threads take tiles of their own, each with a result of its own.
    noise is a number or a vector [N].
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
        self.square: Tensor | None = None  # [N, N], whose lower triangle they all are
        self.evaluated = 0  # entries of the matrix that were formed so far

    def without_noise(self) -> Gram:
        """K(x, x) alone, sharing everything else."""
        other = object.__new__(Gram)
        other.__dict__.update(self.__dict__)
        other.noise = torch.zeros_like(self.noise)
        return other

    @property
    def keeps_all(self) -> bool:
        """Whether tiles are formed once, and kept."""
        return self.square is not None or len(self.kept) == self._panels or (
            self.shape[0] ** 2 * self.dtype.itemsize / 2 <= self.budget)  # fmt: skip

    def take_over(self, old: Gram) -> None:
        """The tiles that `old`, of the first of these inputs and with the same shift, has kept."""
        self._make_square()
        for start, panel in old.kept.items():
            if panel.shape[0] != ROWS:  # the last one may have grown
                continue
            if self.square is not None:
                self.kept[start] = self.square[start : start + ROWS, : start + ROWS].copy_(panel)
            elif panel.nbytes <= self.budget:
                self.kept[start] = panel if old.square is None else panel.clone()
                self.budget -= panel.nbytes

    def __matmul__(self, v: Tensor) -> Tensor:
        N, rows = self.shape[0], _rows(v)
        whole = self.square is not None and len(self.kept) == self._panels
        if whole and len(rows) == 1 and self._workers(N * N // 2) <= FEW:
            assert self.square is not None
            out = lower_triangle.product(self.square, rows[0]).addcmul_(rows[0], self.noise)
            return out.unsqueeze(1) if v.dim() == 2 else out
        out = (rows * self.noise).contiguous()
        parts = [out, *(torch.zeros_like(out) for _ in range(1, self._workers(N * N // 2)))]

        def add(worker: int, here: slice, there: slice, tile: Tensor) -> None:
            _add_product(parts[worker][:, here], rows[:, there], tile.T)
            below = min(there.stop, here.start)  # what lies left of the diagonal stands for its transpose too
            if below > there.start:
                left = tile[:, : below - there.start]
                _add_product(parts[worker][:, there.start : below], rows[:, here], left)

        self._lower(add, len(parts))
        for part in parts[1:]:
            out += part
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

        def put(_: int, here: slice, there: slice, tile: Tensor) -> None:
            out[here, there] = tile
            out[there, here] = tile.T

        self._lower(put, self._workers(N * N // 2))
        out.diagonal().add_(self.noise)
        return out

    def _workers(self, entries: int) -> int:
        return workers(entries, self.device) if self.kernel.threads else 1

    def _filled(self, left: list[Tensor], right: list[Tensor]) -> Tensor:
        B, C = len(left[0]), len(right[0])
        out = left[0].new_empty(B, C)

        def put(_: int, here: slice, there: slice, tile: Tensor) -> None:
            out[here, there] = tile

        self._rectangle(left, right, put, self._workers(B * C))
        return out

    def _product(self, left: list[Tensor], rows: Tensor) -> Tensor:
        """[S, B]: each column does not depend on the other inputs in `left`."""
        B = len(left[0])
        parts = [rows.new_zeros(len(rows), B) for _ in range(self._workers(self.shape[0] * B))]

        def add(worker: int, here: slice, there: slice, tile: Tensor) -> None:
            _add_product(parts[worker][:, here], rows[:, there], tile.T)

        self._rectangle(left, self.points, add, len(parts))
        for part in parts[1:]:
            parts[0] += part
        return parts[0]

    def _rectangle(self, left: list[Tensor], right: list[Tensor], use: Use, count: int) -> None:
        """use(worker, rows, columns, tile) for tiles that cover left x right; each of `count` workers has columns of
        its own."""
        B, C = len(left[0]), len(right[0])
        width = COLUMNS * max(1, ROWS // max(1, B))
        share = -(-C // (width * count)) * width

        def work(worker: int) -> None:
            for i in range(0, B, ROWS):
                here = slice(i, min(i + ROWS, B))
                mine = [t[here] for t in left]
                for j in range(worker * share, min((worker + 1) * share, C), width):
                    there = slice(j, min(j + width, C))
                    tile = self.kernel.tile(mine, [t[there] for t in right], self.buffers)
                    use(worker, here, there, tile)
                    self.buffers.give(tile)

        self.evaluated += B * C
        side_by_side(work, count)

    def _lower(self, use: Use, count: int) -> None:
        """use(worker, rows, columns, tile) for tiles that cover the lower triangle of K; rows that are kept are one."""
        N = self.shape[0]
        panels = [slice(i, min(i + ROWS, N)) for i in range(0, N, ROWS)]
        new = self._new_panels(panels)

        def work(worker: int) -> None:
            for here in panels[worker::count]:
                panel = self.kept.get(here.start)
                if panel is None:
                    self._formed(here, new.get(here.start), worker, use)
                else:
                    use(worker, here, slice(0, here.stop), panel)

        side_by_side(work, count)
        self.kept.update(new)

    @property
    def _panels(self) -> int:
        return -(-self.shape[0] // ROWS)

    def _make_square(self) -> None:
        """Room for all of K, where it may be kept."""
        size = self.shape[0] ** 2 * self.dtype.itemsize
        if not self.kept and size <= self.budget and lower_triangle.multiplies(self.dtype, self.device):
            self.budget -= size
            again = (
                size <= KERNEL_POOLED.of()
            )  # a larger one takes its own pages: those above the diagonal are never touched
            self.square = pooled(self.shape, self.points[0]) if again else self.points[0].new_empty(self.shape)

    def _new_panels(self, panels: list[slice]) -> dict[int, Tensor]:
        """Room for the rows that are to be kept from now on, by first row."""
        if self.square is None:
            self._make_square()
        new = {}
        for here in panels:
            if here.start in self.kept:
                continue
            shape = here.stop - here.start, here.stop
            self.evaluated += shape[0] * shape[1]
            size = shape[0] * shape[1] * self.dtype.itemsize
            if self.square is not None:
                new[here.start] = self.square[here, : here.stop]
            elif size <= self.budget:
                self.budget -= size
                new[here.start] = pooled(shape, self.points[0])
        return new

    def _formed(self, here: slice, panel: Tensor | None, worker: int, use: Use) -> None:
        left = [t[here] for t in self.points]
        for j in range(0, here.stop, COLUMNS):
            there = slice(j, min(j + COLUMNS, here.stop))
            out = None if panel is None else panel[:, there]
            buffers = self.buffers if out is None else Placed(self.buffers, out)
            tile = self.kernel.tile(left, [t[there] for t in self.points], buffers)
            if j == here.start:  # distances of 0 may have been rounded
                tile.diagonal().copy_(self.diagonal[here])
            if out is not None and tile.data_ptr() != out.data_ptr():
                out.copy_(tile)
            use(worker, here, there, tile)
            buffers.give(tile)


def _add_product(out: Tensor, rows: Tensor, tile: Tensor) -> None:
    """out += rows @ tile."""
    if len(rows) == 1:
        out[0].addmv_(tile.T, rows[0])
    else:
        out.addmm_(rows, tile)


def _rows(v: Tensor) -> Tensor:
    """[N] or [N, S] as contiguous [S, N]."""
    return (v.T if v.dim() == 2 else v.unsqueeze(0)).contiguous()
