"""The dual form: where outputs times data points are few, their tangent kernel is solved with, and not the weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError
from paraboloid.operators.vectors import join
from paraboloid.passes.memory import RECORDINGS
from paraboloid.posteriors.sampled.output_kernel import OutputKernel, contracted, output_kernel
from paraboloid.posteriors.sampled.tangent_system import TangentSystem
from paraboloid.quantities.curvature import SqrtGGN
from paraboloid.quantities.recording import record

PIECE = 4096  # weights whose rows are taken together in float64
MOST_ROWS = 6000  # of a tangent kernel: 288 MB, and a Cholesky factor of a few seconds


class TangentKernel:
    """Woodbury's form of the covariance Sigma = (S strength G S + Lambda)^-1 of a tangent system,

        Sigma = Lambda^-1 - Lambda^-1 B^T (I + B Lambda^-1 B^T)^-1 B Lambda^-1,     B = sqrt(strength) L^T J S  [R, D],

    with L_n L_n^T = H_n and a row of B for each data point n and column of L_n.  The kernel B Lambda^-1 B^T [R, R] is
    that of the outputs between L^T and L, without rows (`output_kernel`).  Where it is not to be had, it is made of
    blocks of rows of B: all of B where it fits into `max_memory`, else a row at a time, which is pushed through all
    graphs.  The graphs must be kept.
    """

    def __init__(self, system: TangentSystem):
        assert system.replay.kept is not None and system.group is None
        self.system, self.graphs = system, system.replay.kept
        self.sizes = [len(graph.f) * graph.root_columns() for graph in self.graphs]
        self.made: tuple[Tensor, Tensor] | None = None  # a precision, and the Cholesky factor under it

    @property
    def size(self) -> int:
        """R."""
        return sum(self.sizes)

    def renewed(self) -> TangentKernel:
        """That of the system whose strength or scale has changed."""
        found = TangentKernel(self.system)
        if "B" in self.__dict__:
            _ = found.B
        if "outputs" in self.__dict__:
            before = self.outputs
            found.__dict__["outputs"] = None if before is None else OutputKernel(self.system, before.forms)
        return found

    @cached_property
    def outputs(self) -> OutputKernel | None:
        return output_kernel(self.system, MOST_ROWS)

    @property
    def rows(self) -> Tensor | None:
        """B where it is kept: for solves by blocks, or where there is no kernel of the outputs."""
        return self.B if "B" in self.__dict__ or self.outputs is None else None

    def apply(self, precision: Tensor, rows: Tensor) -> Tensor:
        """Sigma times the rows of a [K, D] tensor under Lambda = diag(precision)."""
        scaled = rows / precision
        u = solved(self.factor(precision), self.forward(scaled).double().T).T
        return scaled - self.backward(u.to(rows)) / precision

    def forward(self, rows: Tensor) -> Tensor:
        """B w_k, [K, R]."""
        if (B := self.rows) is not None:
            return rows @ B.T
        found = []
        with torch.no_grad(), self.system.replay.graphs() as graphs:
            for graph in graphs:
                jv = self.system.pushed(graph, rows).flatten(2)  # [K, n, C]
                root = torch.stack(list(graph.root())).flatten(2)  # [V, n, C]
                found.append(torch.einsum("knc,vnc->knv", jv, root).flatten(1))
        return torch.cat(found, 1) * self.system.strength**0.5

    def backward(self, u: Tensor) -> Tensor:
        """B^T u_k, [K, D], for u [K, R]."""
        if (B := self.rows) is not None:
            return u @ B
        found = u.new_zeros(len(u), self.system.size)
        with torch.no_grad(), self.system.replay.graphs() as graphs:
            for graph, part in zip(graphs, u.split(self.sizes, 1), strict=True):
                root = torch.stack(list(graph.root()))
                outputs = torch.einsum("knv,vnc->knc", part.view(len(u), -1, len(root)), root.flatten(2))
                for k, parts in self.system.pulled(graph, outputs.view(len(u), *graph.f.shape)):
                    found[k] += join(parts)
        return self.system.deviations(found).mul_(self.system.strength**0.5)

    def kernel(self, precision: Tensor) -> Tensor:
        """B Lambda^-1 B^T, [R, R], in float64: in float32 the identity beside it would drown in its largest values."""
        if self.outputs is not None:
            roots = [torch.stack(list(graph.root())).flatten(2).permute(1, 2, 0) for graph in self.graphs]
            return contracted(self.outputs.at(precision), roots).mul_(self.system.strength)
        if self.B is None:
            kernel = torch.cat([self.forward(rows / precision) for rows in self._rows()]).double()
            return (kernel + kernel.T) / 2
        root = precision.rsqrt()
        found = torch.zeros(self.size, self.size, dtype=torch.float64, device=root.device)
        for piece, scale in zip(self.B.split(PIECE, 1), root.split(PIECE), strict=True):
            part = (piece * scale).double()
            found.addmm_(part, part.T)
        return found

    def factor(self, precision: Tensor) -> Tensor:
        """The Cholesky factor of I + B Lambda^-1 B^T."""
        if self.made is None or not torch.equal(self.made[0], precision):
            self.made, kernel = None, self.kernel(precision)
            kernel.diagonal().add_(1)
            self.made = precision, factor_of(kernel)
        return self.made[1]

    @cached_property
    def B(self) -> Tensor | None:
        """All rows [R, D], by the engine; None where they would not fit, or where an operation has no rule."""
        system, replay = self.system, self.system.replay
        bytes_needed = self.size * system.size * system.like.element_size()
        if bytes_needed > RECORDINGS.of(replay.max_memory, least=0) - replay.size:
            return None
        rows: list[Tensor] = []
        with warnings.catch_warnings(), suppress(ValueError, NotImplementedError, RuntimeError, Warning):
            warnings.simplefilter("error")
            with replay.recorded(lambda: record(replay.model)) as tapes:
                for (tape, f, _), graph in zip(tapes, self.graphs, strict=True):
                    found = tape.of_vectors(f, graph.root(), SqrtGGN(), replay.max_memory).values()
                    rows.append(torch.cat([t.flatten(2) for t in found], 2).transpose(0, 1).flatten(0, 1))
            return system.deviations(torch.cat(rows)).mul_(system.strength**0.5)
        return None

    def _rows(self) -> Iterator[Tensor]:
        """The rows of B, one at a time, [1, D]."""
        with torch.no_grad():
            for graph in self.graphs:
                columns = list(graph.root())
                for n in range(len(graph.f)):
                    for column in columns:
                        alone = torch.zeros_like(column)
                        alone[n] = column[n]
                        row = self.system.deviations(join(graph.pull(alone)).unsqueeze(0))
                        yield row * self.system.strength**0.5


def factor_of(kernel: Tensor) -> Tensor:
    """The Cholesky factor of the identity plus a tangent kernel, [R, R]."""
    L, failed = torch.linalg.cholesky_ex(kernel)
    if failed:
        raise LinAlgError(
            f"the tangent kernel of {len(kernel)} rows has no Cholesky factor; expected the identity plus a positive "
            "semi-definite matrix. Take solver='cg', or float64."
        )
    return L


def solved(L: Tensor, b: Tensor) -> Tensor:
    """(L L^T)^-1 b for b [R, K], without the copy of L that `torch.cholesky_solve` makes."""
    half = torch.linalg.solve_triangular(L, b, upper=False)
    return torch.linalg.solve_triangular(L.mT, half, upper=True)


def rows_of(system: TangentSystem) -> int | None:
    """How many rows its tangent kernel has; None where graphs are not kept, or data is elsewhere."""
    if system.replay.kept is None or system.group is not None:
        return None
    return sum(len(graph.f) * graph.root_columns() for graph in system.replay.kept)
