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
from paraboloid.operators.blocks import Blocks, dense_blocks, places, product, resolve_blocks
from paraboloid.operators.replay import Replay
from paraboloid.operators.root import Root
from paraboloid.operators.vectors import dot, join, split


class OutputGraph:
    """The output of one batch with the graphs of J^T w and of J v, unreduced.

    g(u) = J^T u is linear in u, so J v is the gradient of g(u).v in u, for the price of about one backward pass; the
    graph of g is recorded once.  Source: Townsend 2017, "A new trick for calculating Jacobian vector products".
    """

    def __init__(self, f: Tensor, y: Any, loss: Loss, parameters: list[Tensor], index: int = 0):
        self.f, self.y, self.loss, self.parameters, self.index = f, y, loss, parameters, index

    def prepare(self) -> None:
        _ = self.transposed

    @cached_property
    def transposed(self) -> tuple[Tensor, dict[int, Tensor]]:
        """u and the parts of g(u) that depend on it, by the parameter's place."""
        u = torch.zeros_like(self.f, requires_grad=True)
        g = torch.autograd.grad(self.f, self.parameters, u, create_graph=True, allow_unused=True)
        return u, {i: t for i, t in enumerate(g) if t is not None and t.requires_grad}

    def pull(self, w: Tensor, block: Sequence[int] | None = None) -> list[Tensor]:
        """J^T w, one tensor for each parameter (of a block)."""
        chosen = self.parameters if block is None else [self.parameters[i] for i in block]
        grads = torch.autograd.grad(self.f, chosen, w.to(self.f.dtype), retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, grads, strict=True)]

    def push(self, v: Sequence[Tensor], block: Sequence[int] | None = None) -> Tensor:
        """J v, of the output's shape; for v along the parameters of a block."""
        u, g = self.transposed
        at = range(len(self.parameters)) if block is None else block
        pairs = [(g[i], t.to(g[i].dtype)) for i, t in zip(at, v, strict=True) if i in g]
        if not pairs:
            return torch.zeros_like(self.f)
        outputs, weights = zip(*pairs, strict=True)
        (jv,) = torch.autograd.grad(outputs, u, weights, retain_graph=True, materialize_grads=True)
        return jv

    def product(self, v: Sequence[Tensor], block: Sequence[int]) -> list[Tensor]:
        """J^T H J v within a block of parameters."""
        return self.pull(self.hessian(self.push(v, block)), block)

    def telling_product(self, v: Sequence[Tensor], block: Sequence[int]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """The product, with (J v).(H J v) and v.(J^T H J v), which are equal if J and J^T are each other's transpose,
        and their scale."""
        jv = self.push(v, block)
        hjv = self.hessian(jv)
        found = self.pull(hjv, block)
        return found, (jv * hjv).sum(), dot(v, found), jv.norm() * hjv.norm()

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

    blocks: "all", or only the diagonal blocks of each "parameter", each "layer" or lists of names: see
    `paraboloid.operators.blocks`.  A product with every block costs up to 2 gradients for each of them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        data: Any,
        *,
        blocks: Blocks = "all",
        output: Output | None = None,
        seed: int = 0,
        max_memory: int | None = None,
    ):
        self.replay = Replay(model, loss_fn, data, OutputGraph, output=output, seed=seed, max_memory=max_memory)
        self.parameters = self.replay.parameters
        self.blocks = resolve_blocks(self.parameters, blocks)
        self.root = Root(self.replay)

    def _product(self, rows: Tensor) -> Tensor:
        if (S := self.root.after(len(rows))) is None:
            return product(self.replay, self.blocks, rows)
        if self.blocks is None:
            return (rows @ S.T) @ S / self.replay.normalizer
        result = torch.empty_like(rows)
        for at in (places(self.parameters, block) for block in self.blocks):
            result[:, at] = (rows[:, at] @ S[:, at].T) @ S[:, at] / self.replay.normalizer
        return result

    def to_dense(self) -> Tensor:
        return super().to_dense() if self.blocks is None else dense_blocks(self).to_dense()

    def quadratic_forms(self, directions: Tensor) -> Tensor:
        if self.blocks is not None:
            return super().quadratic_forms(directions)
        rows = self.rows(directions)
        if (S := self.root.after(len(rows))) is not None:
            return (rows @ S.T).square().sum(1) / self.replay.normalizer
        with self.replay.graphs() as graphs:
            forms = rows.new_zeros(len(rows))
            for graph in graphs:
                self.replay.certify(graph)
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
