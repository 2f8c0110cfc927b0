"""The Jacobian of a model's outputs in its parameters, as a matrix known by its products from both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from paraboloid.data.batches import Data, Output
from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.operators.matrix_free.replay import Replay
from paraboloid.operators.outputs_alone import OutputsAlone
from paraboloid.operators.product import as_scipy
from paraboloid.operators.vectors import join, split
from paraboloid.passes import trees


class Jacobian:
    """J [N K, D]: row (n, k) is the gradient of output element k of sample n, over all the data in order.

        J = pb.operators.Jacobian(model, (inputs, targets))
        J @ v          # v [D] or [D, K'], or a dict by name: [N K] or [N K, K']
        J.T @ u        # u [N K] or [N K, K']: [D]

    The targets are not looked at but for their number.  `outputs` are the model's, [N, *shape] (a list where batches
    differ in shape).  Costs, and what is kept between products, are those of `pb.GGN`: J v about one gradient, J^T u
    one backward pass.  Operations without a second derivative take rows of J, see `pb.GGN`.
    """

    __array_ufunc__ = None  # so that NumPy leaves v @ J to us

    def __init__(
        self, model: Any, data: Data, *, output: Output | None = None, seed: int = 0, max_memory: int | None = None
    ):  # fmt: skip
        self.replay = Replay(model, OutputsAlone(), data, OutputGraph, output=output, seed=seed, max_memory=max_memory)
        self.parameters = self.replay.parameters
        self.outputs = [f.detach() for f in self._each(lambda graph: graph.f)]
        size = sum(p.numel() for p in self.parameters.values())
        self.shape = sum(f.numel() for f in self.outputs), size
        first = next(iter(self.parameters.values()))
        self.dtype = torch.float32 if first.dtype in (torch.float16, torch.bfloat16) else first.dtype
        self.device = first.device

    def _each(self, visit: Any) -> list[Any]:
        with self.replay.graphs() as graphs:
            found = []
            for graph in graphs:
                self.replay.certify(graph)
                found.append(visit(graph))
            return found

    @property
    def T(self) -> _Transposed:
        """The transpose, [D, N K]."""
        return _Transposed(self)

    def __matmul__(self, v: Any) -> Tensor:
        v = trees.flatten(v, self.parameters) if isinstance(v, Mapping) else v
        columns = _columns(v, self.shape[1])
        vectors = [split(c.to(self.dtype), list(self.parameters.values())) for c in columns]
        parts = self._each(lambda graph: torch.stack([graph.push(one).detach().flatten() for one in vectors], 1))
        found = torch.cat(parts).to(self.dtype)
        return found if v.dim() == 2 else found[:, 0]

    def transposed_product(self, u: Tensor) -> Tensor:
        """J^T u."""
        columns = _columns(u, self.shape[0])
        sizes = [f.numel() for f in self.outputs]
        pieces = iter(zip(*(c.split(sizes) for c in columns), strict=True))

        def pulled(graph: Any) -> Tensor:
            return torch.stack([join(graph.pull(piece.view_as(graph.f))) for piece in next(pieces)], 1)

        found = torch.stack(self._each(pulled)).sum(0).to(self.dtype)
        return found if u.dim() == 2 else found[:, 0]

    def to_dense(self) -> Tensor:
        """[N K, D], by as many products as the smaller side has."""
        if self.shape[0] <= self.shape[1]:
            return (self.T @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)).T
        return self @ torch.eye(self.shape[1], dtype=self.dtype, device=self.device)

    def to_scipy(self) -> Any:
        """The same as a `scipy.sparse.linalg.LinearOperator`, float64 in and out."""
        return as_scipy(self, self.T)

    def __repr__(self) -> str:
        return f"Jacobian({list(self.shape)}, {self.dtype}, {self.device})"


class _Transposed:
    def __init__(self, J: Jacobian):
        self.J, self.shape, self.dtype, self.device = J, J.shape[::-1], J.dtype, J.device

    @property
    def T(self) -> Jacobian:
        return self.J

    def __matmul__(self, u: Tensor) -> Tensor:
        return self.J.transposed_product(u)

    def to_dense(self) -> Tensor:
        return self.J.to_dense().T


def _columns(v: Any, size: int) -> list[Tensor]:
    if not isinstance(v, Tensor) or v.dim() not in (1, 2) or len(v) != size:
        found = tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"the vector is {found}; expected a tensor [{size}] or [{size}, K].")
    return [v] if v.dim() == 1 else list(v.T)
