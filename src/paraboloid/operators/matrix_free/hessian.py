"""The Hessian of the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.probes import normal
from paraboloid.losses import Loss
from paraboloid.operators.matrix_free.certificate import Differenced, lacks_derivative, without_derivative
from paraboloid.operators.matrix_free.recorded import Recorded
from paraboloid.operators.vectors import dot


@contextmanager
def twice() -> Iterator[None]:
    """Say what needs a second derivative where an operation has none."""
    try:
        yield
    except RuntimeError as e:  # NotImplementedError is one
        if lacks_derivative(e):
            raise without_derivative(e) from e
        raise


class GradientGraph(Differenced):
    """The gradient of one batch's unreduced loss, with its graph: a product is one backward pass through it."""

    def __init__(self, f: Tensor, y: Any, loss: Loss, parameters: list[Tensor], index: int = 0):
        self.f, self.y, self.loss, self.parameters = f, y, loss, parameters
        self.direction: list[Tensor] = []
        self.curvature: list[Tensor] = []

    def prepare(self) -> None:
        _ = self.g

    @cached_property
    def g(self) -> list[Tensor]:
        """The gradient, differentiable once more."""
        total = self.loss.sample_losses(self.f, self.y).sum()
        with twice():
            grads = torch.autograd.grad(total, self.parameters, create_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, grads, strict=True)]

    def gradient(self) -> list[Tensor]:
        return [g.detach() for g in self.g]

    def adjoint_pair(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """w.(A v) and v.(A w) for random v and w; v and A v are kept."""
        v, w = ([normal(tuple(p.shape), p, generator) for p in self.parameters] for _ in range(2))
        Av, Aw = self.product(v), self.product(w)
        self.direction, self.curvature = v, Av
        return dot(w, Av), dot(v, Aw), dot(Av, Av).sqrt() + dot(Aw, Aw).sqrt()

    def product(self, v: Sequence[Tensor], block: Sequence[int] | None = None) -> list[Tensor]:
        """Hessian times v, one tensor for each parameter (within a block of them); v may be several, [K, *shape]."""
        at = range(len(self.parameters)) if block is None else block
        chosen = [self.parameters[i] for i in at]
        curved = [(self.g[i], w) for i, w in zip(at, v, strict=True) if self.g[i].requires_grad]
        if not curved:  # the loss is linear in the parameters
            return [torch.zeros_like(w) for w in v]
        grads, weights = zip(*curved, strict=True)
        batched = v[0].dim() > chosen[0].dim()
        with twice():
            found = torch.autograd.grad(
                grads, chosen, weights, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )  # fmt: skip
        return [torch.zeros_like(w) if t is None else t for t, w in zip(found, v, strict=True)]


class Hessian(Recorded):
    """The second derivative of the loss as reduced.  Any callable loss works; a loader counts as one big batch.

    See `paraboloid.operators` for the arguments, and for what is kept between products.

    Cost: a product with a kept graph is about 2 gradients; `to_dense`, `diagonal` and `trace` take D products, or
    `samples=` of them.

    blocks: "all", or only the diagonal blocks of each "parameter", each "layer" or lists of names: see
    `paraboloid.operators.partition`.  A product with every block costs up to 2 gradients for each of them.
    """

    graph = GradientGraph
