"""The output of one batch, recorded for products with its Jacobian from both sides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.probes import normal
from paraboloid.losses import Loss
from paraboloid.operators.matrix_free.certificate import lacks_derivative
from paraboloid.operators.matrix_free.jacobian_rows import by_pulls
from paraboloid.operators.vectors import dot
from paraboloid.passes.autograd_walks import depending
from paraboloid.passes.memory import RECORDINGS

KEPT = 2**16  # outputs, of which what the loss's curvature needs is kept: its making is most of a small product


@contextmanager
def suppress_lacking() -> Iterator[None]:
    """Go on behind the block where an operation has no second derivative: `push` sees to it."""
    try:
        yield
    except RuntimeError as e:
        if not lacks_derivative(e):
            raise


class OutputGraph:
    """The output of one batch with the graphs of J^T w and of J v, unreduced.

    g(u) = J^T u is linear in u, so J v is the gradient of g(u).v in u, for the price of about one backward pass; the
    graph of g is recorded once.  Source: Townsend 2017, "A new trick for calculating Jacobian vector products".

    That takes a derivative of g's operations, which some have not (Hardsigmoid, `cdist`, a NumPy kernel): then J itself
    is kept, `rows` [f.numel(), D], made by `made_rows` (default: one backward pass for each of them).
    """

    def __init__(self, f: Tensor, y: Any, loss: Loss, parameters: list[Tensor], index: int = 0):
        self.f, self.y, self.loss, self.parameters, self.index = f, y, loss, parameters, index
        self.rows: Tensor | None = None
        self.made_rows: Callable[[], Callable[[OutputGraph], Tensor] | None] = lambda: None  # a weak reference

    def prepare(self) -> None:
        if self.rows is None:
            with suppress_lacking():
                _ = self.transposed

    def take_rows(self) -> None:
        """J row by row from now on."""
        if self.rows is None:
            made = self.made_rows()
            rows = by_pulls(self.f, self.parameters, RECORDINGS.default) if made is None else made(self)
            self.rows = rows

    def check_cut(self) -> None:
        """Take the rows where a parameter's part of g is cut off from u, though it is not zero."""
        if self.rows is not None:
            return
        try:
            u, parts = self.transposed
        except RuntimeError as e:
            if not lacks_derivative(e):
                raise
            self.take_rows()
            return
        reached = depending(parts, u)
        if len(reached) < len(self.parameters):
            w = normal(tuple(self.f.shape), self.f, torch.Generator(self.f.device).manual_seed(0))
            if any(bool(t.any()) for i, t in enumerate(self.pull(w)) if i not in reached):
                self.take_rows()

    @cached_property
    def transposed(self) -> tuple[Tensor, dict[int, Tensor]]:
        """u and the parts of g(u) that depend on it, by the parameter's place."""
        u = torch.zeros_like(self.f, requires_grad=True)
        g = torch.autograd.grad(self.f, self.parameters, u, create_graph=True, allow_unused=True)
        return u, {i: t for i, t in enumerate(g) if t is not None and t.requires_grad}

    def pull(self, w: Tensor, block: Sequence[int] | None = None) -> list[Tensor]:
        """J^T w, one tensor for each parameter (of a block); for w [K, *f.shape] several at once, [K, *shape]."""
        chosen = self.parameters if block is None else [self.parameters[i] for i in block]
        w, batched = w.to(self.f.dtype), w.dim() > self.f.dim()
        grads = torch.autograd.grad(
            self.f, chosen, w, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )  # fmt: skip
        lead = w.shape[:1] if batched else ()
        return [p.new_zeros(lead + p.shape) if g is None else g for p, g in zip(chosen, grads, strict=True)]

    def push(self, v: Sequence[Tensor], block: Sequence[int] | None = None) -> Tensor:
        """J v, of the output's shape; for v along the parameters of a block.  For v [K, *shape]: [K, *f.shape]."""
        if self.rows is None:
            try:
                return self._push(v, block)
            except RuntimeError as e:  # NotImplementedError is one
                if not lacks_derivative(e):
                    raise
                self.take_rows()
        assert self.rows is not None
        sizes = [p.numel() for p in self.parameters]
        at = range(len(sizes)) if block is None else block
        pieces = self.rows.split(sizes, 1)
        found = sum(t.reshape(-1, sizes[i]).to(self.rows) @ pieces[i].T for i, t in zip(at, v, strict=True))
        lead = v[0].shape[:1] if v[0].dim() > self.parameters[at[0]].dim() else ()
        return torch.as_tensor(found).view(*lead, *self.f.shape).to(self.f.dtype)

    def _push(self, v: Sequence[Tensor], block: Sequence[int] | None) -> Tensor:
        u, g = self.transposed
        at = range(len(self.parameters)) if block is None else block
        lead = v[0].shape[:1] if v[0].dim() > self.parameters[at[0]].dim() else ()
        pairs = [(g[i], t.to(g[i].dtype)) for i, t in zip(at, v, strict=True) if i in g]
        if not pairs:
            return torch.zeros_like(self.f).expand(*lead, *self.f.shape)
        outputs, weights = zip(*pairs, strict=True)
        (jv,) = torch.autograd.grad(
            outputs, u, weights, retain_graph=True, materialize_grads=True, is_grads_batched=bool(lead)
        )  # fmt: skip
        return jv

    def product(self, v: Sequence[Tensor], block: Sequence[int]) -> list[Tensor]:
        """J^T H J v within a block of parameters; for several v at once where they are [K, *shape]."""
        return self.pull(self.hessian(self.push(v, block)), block)

    def telling_product(self, v: Sequence[Tensor], block: Sequence[int]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """The product, with (J v).(H J v) and v.(J^T H J v), which are equal if J and J^T are each other's transpose,
        and their scale."""
        jv = self.push(v, block)
        hjv = self.hessian(jv)
        found = self.pull(hjv, block)
        return found, (jv * hjv).sum(), dot(v, found), jv.norm() * hjv.norm()

    def hessian(self, u: Tensor) -> Tensor:
        """H u, the (positive semi-definite) curvature of the unreduced loss in the output; u with any leading axes."""
        if self.f.numel() > KEPT:
            return self.loss.curvature_product(self.f.detach(), self.y, u)
        return self._curvature(u)

    @cached_property
    def _curvature(self) -> Callable[[Tensor], Tensor]:
        return self.loss.curvature_at(self.f.detach(), self.y)

    def root(self) -> Iterator[Tensor]:
        """Vectors s_v of the output's shape with sum_v s_v[n] s_v[n]^T = H_n for each sample."""
        return self.loss.hessian_root(self.f.detach(), self.y)

    def root_columns(self) -> int:
        """How many vectors `root` yields."""
        return self.loss.root_columns(self.f)

    def adjoint_pair(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """w.(J v) and (J^T w).v for random v and w."""
        v = [normal(tuple(p.shape), p, generator) for p in self.parameters]
        w = normal(tuple(self.f.shape), self.f, generator)
        jv, jw = self.push(v), self.pull(w)
        size, transposed = jv.norm(), dot(jw, jw).sqrt()
        if self.rows is None and not math.isfinite(size) and all(bool(t.isfinite().all()) for t in jw):
            self.take_rows()  # J is finite, but not what a derivative of g makes of it
            jv = self.push(v)
            size = jv.norm()
        return (w * jv).sum(), dot(jw, v), size + transposed

    def gradient(self) -> list[Tensor]:
        return self.pull(self.loss.gradient(self.f.detach(), self.y))
