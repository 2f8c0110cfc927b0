"""The generalised Gauss-Newton matrix of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import Output
from paraboloid.linalg.probes import Seed, normal
from paraboloid.losses import Loss
from paraboloid.operators.base import LinearOperator
from paraboloid.operators.replay import Replay
from paraboloid.operators.root import Root


class OutputGraph:
    """The output of one batch with the graphs of J^T w and of J v, unreduced.

    g(u) = J^T u is linear in u, so J v is the gradient of g(u).v in u, for the price of about one backward pass; the
    graph of g is recorded once.  Source: Townsend 2017, "A new trick for calculating Jacobian vector products".
    """

    def __init__(self, f: Tensor, y: Any, loss: Loss, parameters: list[Tensor]):
        self.f, self.y, self.loss, self.parameters = f, y, loss, parameters

    def prepare(self) -> None:
        _ = self.transposed

    @cached_property
    def transposed(self) -> tuple[Tensor, dict[int, Tensor]]:
        """u and the parts of g(u) that depend on it, by the parameter's place."""
        u = torch.zeros_like(self.f, requires_grad=True)
        g = torch.autograd.grad(self.f, self.parameters, u, create_graph=True, allow_unused=True)
        return u, {i: t for i, t in enumerate(g) if t is not None and t.requires_grad}

    def pull(self, w: Tensor) -> list[Tensor]:
        """J^T w, one tensor for each parameter."""
        grads = torch.autograd.grad(self.f, self.parameters, w.to(self.f.dtype), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, grads, strict=True)]

    def push(self, v: list[Tensor]) -> Tensor:
        """J v, of the output's shape."""
        u, g = self.transposed
        if not g:
            return torch.zeros_like(self.f)
        weights = [v[i].to(t.dtype) for i, t in g.items()]
        (jv,) = torch.autograd.grad(list(g.values()), u, weights, retain_graph=True, materialize_grads=True)
        return jv

    def hessian(self, u: Tensor) -> Tensor:
        """H u, the (positive semi-definite) curvature of the unreduced loss in the output."""
        return self.loss.curvature_product(self.f.detach(), self.y, u)

    def adjoint_pair(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """w.(J v) and (J^T w).v for random v and w."""
        v = [normal(tuple(p.shape), p, generator) for p in self.parameters]
        w = normal(tuple(self.f.shape), self.f, generator)
        jv, jw = self.push(v), self.pull(w)
        return (w * jv).sum(), dot(jw, v), jv.norm() + dot(jw, jw).sqrt()

    def gradient(self) -> list[Tensor]:
        return self.pull(self.loss.gradient(self.f.detach(), self.y))


class GGN(LinearOperator):
    """sum_n J_n^T H_n J_n times the reduction's factor: the curvature of the loss as reduced, without the model's own.

    J_n is the Jacobian of the output of sample n, H_n the Hessian of its unreduced loss.  A loader counts as one big
    batch.  See `paraboloid.operators` for the arguments, and for what is kept between products.

    Cost, in gradients: a product with a kept graph is about 2, a quadratic form 1 (J alone).  `to_dense` takes D
    products; `diagonal` and `trace` take D quadratic forms, or one backward pass for each sample and column of the
    loss's root (about N C of them) where those are fewer; `samples=` takes that many.  Where weights are used at many
    positions (convolutions) and many products are asked for, a square root of the matrix takes over: see `Root`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        data: Any,
        *,
        output: Output | None = None,
        seed: int = 0,
        max_memory: int | None = None,
    ):
        self.replay = Replay(model, loss_fn, data, OutputGraph, output=output, seed=seed, max_memory=max_memory)
        self.parameters = self.replay.parameters
        self.root = Root(self.replay)

    def _product(self, rows: Tensor) -> Tensor:
        if (S := self.root.after(len(rows))) is not None:
            return (rows @ S.T) @ S / self.replay.normalizer
        with self.replay.graphs() as graphs:
            result = torch.zeros_like(rows)
            for graph in graphs:
                for v, total in zip(rows, result, strict=True):
                    w = graph.hessian(graph.push(split(v, graph.parameters)))
                    total += join(graph.pull(w))
        return result / self.replay.normalizer

    def quadratic_forms(self, directions: Tensor) -> Tensor:
        rows = self.rows(directions)
        if (S := self.root.after(len(rows))) is not None:
            return (rows @ S.T).square().sum(1) / self.replay.normalizer
        with self.replay.graphs() as graphs:
            forms = rows.new_zeros(len(rows))
            for graph in graphs:
                for i, v in enumerate(rows):
                    jv = graph.push(split(v, graph.parameters))
                    forms[i] += (jv * graph.hessian(jv)).sum()
        return forms / self.replay.normalizer

    def diagonal(self, samples: int | None = None, seed: Seed = 0) -> Tensor:
        if samples is not None:
            return super().diagonal(samples, seed)
        if (S := self.root.after(min(self.shape[0], self._root_vectors()))) is not None:
            return S.square().sum(0) / self.replay.normalizer
        if self._root_vectors() >= self.shape[0]:
            return super().diagonal()
        with self.replay.graphs() as graphs:
            total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
            for graph in graphs:
                for root in graph.loss.hessian_root(graph.f.detach(), graph.y):
                    for n in range(len(root)):
                        alone = torch.zeros_like(root)
                        alone[n] = root[n]
                        total += join(graph.pull(alone)).square()
        return total / self.replay.normalizer

    def _root_vectors(self) -> int:
        """How many backward passes the diagonal takes by way of the loss's root; D where there is no such way."""
        if self.replay.kept is None:
            return self.shape[0]
        try:
            return sum(len(graph.f) * graph.loss.root_columns(graph.f) for graph in self.replay.kept)
        except NotImplementedError:  # a plain callable may couple the samples
            return self.shape[0]


def split(v: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """A flat [D] vector as one tensor for each parameter."""
    pieces = v.split([p.numel() for p in parameters])
    return [t.view_as(p).to(p.dtype) for t, p in zip(pieces, parameters, strict=True)]


def dot(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """The inner product of two vectors given as one tensor for each parameter."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def join(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor for each parameter as a flat [D] vector."""
    return torch.cat([t.reshape(-1) for t in tensors])
