"""The positive-curvature Hessian."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from paraboloid.data.batches import Data, Output
from paraboloid.engine.tape import Tape, record
from paraboloid.graph.nodes import Graph
from paraboloid.linalg.operand import check_choice
from paraboloid.linalg.probes import normal
from paraboloid.losses import Loss, LossFunction
from paraboloid.operators.matrix_free.hessian import twice
from paraboloid.operators.matrix_free.recorded import Recorded
from paraboloid.operators.vectors import dot
from paraboloid.passes.wrappers import innermost

MODIFIED = {"abs": torch.abs, "clip": lambda d: d.clamp(min=0)}


class BendGraph:
    """The output of one batch and the inputs of its smooth activations, with the graphs of their derivatives.

    J_0 is the Jacobian of the output, J_k that of activation k's input; the curvature at the output is the loss's, that
    at activation k the modified diagonal d_k.  A product is one push to all these places and one pull from them.
    """

    def __init__(self, f: Tensor, y: Any, loss: Loss, parameters: list[Tensor], tape: Tape, modify: str):
        self.f, self.y, self.loss, self.parameters = f, y, loss, parameters
        graph = Graph(f, [call.edge for call in tape.calls])
        with twice():
            bends, _ = graph.bends(f, loss.exact_gradient(f.detach(), y), probe_all=True)
        if graph.others:
            raise NotImplementedError(
                "the positive-curvature Hessian is defined for elementwise activations; found "
                f"{sorted(set(graph.others))}, which bend otherwise (softmax, normalisation, products of activations). "
                "Use pb.GGN(..., blocks=...)."
            )
        self.ends = [get_gradient_edge(f), *(b.below for b in bends)]
        self.d = [MODIFIED[modify](b.d) for b in bends]

    def prepare(self) -> None:
        _ = self.transposed

    @cached_property
    def transposed(self) -> tuple[list[Tensor], dict[int, Tensor]]:
        """u and the parts of sum_k J_k^T u_k that depend on it, by the parameter's place."""
        us = [torch.zeros_like(t, requires_grad=True) for t in (self.f, *self.d)]
        g = torch.autograd.grad(self.ends, self.parameters, us, create_graph=True, allow_unused=True)
        return us, {i: t for i, t in enumerate(g) if t is not None and t.requires_grad}

    def push(self, v: Sequence[Tensor], block: Sequence[int]) -> list[Tensor]:
        """J_k v for every end."""
        us, g = self.transposed
        pairs = [(g[i], t.to(g[i].dtype)) for i, t in zip(block, v, strict=True) if i in g]
        if not pairs:
            return [torch.zeros_like(u) for u in us]
        outputs, weights = zip(*pairs, strict=True)
        with twice():
            return list(torch.autograd.grad(outputs, us, weights, retain_graph=True, materialize_grads=True))

    def pull(self, ws: Sequence[Tensor], block: Sequence[int]) -> list[Tensor]:
        """sum_k J_k^T w_k, one tensor for each parameter of the block."""
        chosen = [self.parameters[i] for i in block]
        ws = [w.to(u.dtype) for w, u in zip(ws, (self.f, *self.d), strict=True)]
        grads = torch.autograd.grad(self.ends, chosen, ws, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, grads, strict=True)]

    def product(self, v: Sequence[Tensor], block: Sequence[int]) -> list[Tensor]:
        jv, *inner = self.push(v, block)
        H = self.loss.curvature_product(self.f.detach(), self.y, jv)
        return self.pull([H, *(d * j for d, j in zip(self.d, inner, strict=True))], block)

    def adjoint_pair(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """w.(J v) and (J^T w).v for random v and w, over all ends."""
        every = range(len(self.parameters))
        v = [normal(tuple(p.shape), p, generator) for p in self.parameters]
        w = [normal(tuple(t.shape), t, generator) for t in (self.f, *self.d)]
        jv, jw = self.push(v, every), self.pull(w, every)
        return dot(w, jv), dot(jw, v), dot(jv, jv).sqrt() + dot(jw, jw).sqrt()

    def gradient(self) -> list[Tensor]:
        w = self.loss.gradient(self.f.detach(), self.y)
        return self.pull([w, *(torch.zeros_like(d) for d in self.d)], range(len(self.parameters)))


class PCH(Recorded):
    """The positive-curvature Hessian: the Hessian's diagonal blocks, made positive semi-definite.

    With d_k the second derivative that the smooth elementwise activation k adds to the Hessian in its input, and J_k
    that input's Jacobian, a block is

        a sum_n J_n^T H_n J_n + a sum_k J_k^T P(d_k) J_k

    where P takes absolute values (modify="abs") or replaces what is negative by zero ("clip"); with P = 1 it is the
    Hessian's block.  H_n is the curvature of the loss (`Loss.curvature_product`).  Networks that are piecewise linear
    have no d_k: their PCH is the GGN.

    blocks: "parameter" or "layer"; between layers the Hessian has further terms, which no P makes positive.  See
    `paraboloid.operators` for the other arguments.  A product with one block costs about 2 gradients.

    Raises NotImplementedError for models that bend otherwise than elementwise (softmax, normalisation, gates).
    Sources: Chen et al. 2018, arXiv:1802.06502 (absolute values); Dangel et al. 2020, arXiv:1912.10985.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Data,
        *,
        blocks: str = "parameter",
        modify: str = "abs",
        output: Output | None = None,
        seed: int = 0,
        max_memory: int | None = None,
    ):
        check_choice("modify", modify, list(MODIFIED))
        if blocks not in ("parameter", "layer"):
            raise ValueError(f"blocks is {blocks!r}; expected 'parameter' or 'layer', the blocks that have a PCH.")
        tapes: list[Tape] = []

        @contextmanager
        def inside() -> Iterator[None]:
            with record(innermost(model), verify=False) as tape:
                tapes[:] = [tape]
                yield

        def graph(f: Tensor, y: Any, loss: Loss, parameters: list[Tensor], index: int) -> BendGraph:
            tape = tapes.pop()
            if missed := sorted(tape.reached(f, tape.calls).missed):
                raise NotImplementedError(
                    f"the positive-curvature Hessian knows recorded calls only, and {missed} are used by operations "
                    "that could not be recorded; freeze them with requires_grad_(False), or use pb.GGN or pb.Hessian."
                )
            return BendGraph(f, y, loss, parameters, tape, modify)

        self._record(
            graph, model, loss_fn, data, blocks, output=output, seed=seed, max_memory=max_memory, inside=inside
        )  # fmt: skip
