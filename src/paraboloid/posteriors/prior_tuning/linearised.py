"""The optimum of the linearised model under a prior: f(x) + J(x) (w - theta), trained on the same data.

An early-stopped network is no optimum of its linearisation, and evidence that is evaluated there misjudges the prior;
at the linearisation's own optimum it does not.  Source: Antoran et al. 2022, arXiv:2206.08900.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paraboloid import linalg
from paraboloid.data.batches import Data, Output
from paraboloid.linalg.operand import LinAlgError
from paraboloid.losses import MSE, Observed, Scaled
from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.operators.matrix_free.replay import Replay
from paraboloid.operators.vectors import join, split

NEWTON_STEPS = 50
HALVINGS = 30
ROUGH_PRODUCTS = 200  # of a step in float32, beyond which rounding lets it come no closer


class LinearisedModel:
    """The summed loss of the linearised model on the data, as a function of delta = w - theta, flat [D]."""

    def __init__(self, replay: Replay):
        self.replay, self.loss = replay, replay.loss
        self.theta = join([p.detach() for p in replay.parameters.values()])
        self.passes = 0  # over the data, so far
        self._last: tuple[Tensor, list[Tensor]] | None = None  # delta, and the linearised outputs there, by batch

    @staticmethod
    def of(model: Any, loss: Any, data: Data, output: Output | None, max_memory: int | None) -> LinearisedModel:
        return LinearisedModel(Replay(model, loss, data, OutputGraph, output=output, max_memory=max_memory))

    @property
    def is_quadratic(self) -> bool:
        return all(isinstance(_bare(term), MSE) for term in self.loss.terms)

    def _passes(self, delta: Tensor, visit: Callable[[Any, Tensor], Tensor]) -> Tensor:
        total: Any = 0.0
        self.passes += 1
        parameters = list(self.replay.parameters.values())
        known = self._last[1] if self._last is not None and self._last[0] is delta else None
        still = known is None and not delta.any()  # at the trained weights themselves
        outputs: list[Tensor] = []
        with self.replay.graphs() as graphs:
            for i, graph in enumerate(graphs):
                self.replay.certify(graph)
                if known is not None:
                    f = known[i]
                else:
                    f = graph.f.detach() if still else graph.f.detach() + graph.push(split(delta, parameters)).detach()
                outputs.append(f)
                total = total + visit(graph, f)
        self._last = delta, outputs
        return total.detach()

    def value(self, delta: Tensor) -> Tensor:
        """Summed loss of the linearised outputs."""
        return self._passes(delta, lambda graph, f: self.loss.sample_losses(f, graph.y).sum())

    def gradient(self, delta: Tensor) -> Tensor:
        """Its gradient J^T l'(f + J delta), [D]."""
        return self._passes(delta, lambda graph, f: join(graph.pull(self.loss.gradient(f, graph.y))))

    def curvature(self, delta: Tensor, v: Tensor) -> Tensor:
        """J^T H(f + J delta) J v, [D] or [D, K]."""
        parameters = list(self.replay.parameters.values())

        def visit(graph, f):
            columns = [v] if v.dim() == 1 else list(v.T)
            found = []
            for column in columns:
                u = self.loss.curvature_product(f, graph.y, graph.push(split(column, parameters)).detach())
                found.append(join(graph.pull(u)))
            return found[0] if v.dim() == 1 else torch.stack(found, 1)

        return self._passes(delta, visit)


def _bare(loss: Any) -> Any:
    """Without multiples and measurements of the output, which leave a squared error one."""
    while isinstance(loss, Scaled | Observed):
        loss = loss.loss
    return loss


class Restricted:
    """The same loss as a function of some weights alone, those at the places `at` [S]."""

    def __init__(self, model: LinearisedModel, at: Tensor):
        self.model, self.at, self.theta = model, at, model.theta[at]
        self.is_quadratic = model.is_quadratic

    @property
    def passes(self) -> int:
        return self.model.passes

    def full(self, v: Tensor) -> Tensor:
        """[S] or [S, K] with zeros for the others, [D] or [D, K]."""
        return v.new_zeros(len(self.model.theta), *v.shape[1:]).index_copy(0, self.at, v)

    def value(self, delta: Tensor) -> Tensor:
        return self.model.value(self.full(delta))

    def gradient(self, delta: Tensor) -> Tensor:
        return self.model.gradient(self.full(delta))[self.at]

    def curvature(self, delta: Tensor, v: Tensor) -> Tensor:
        return self.model.curvature(self.full(delta), self.full(v))[self.at]


class _Precision:
    """strength J^T H J + Lambda at delta, for conjugate gradients."""

    def __init__(self, model: LinearisedModel | Restricted, delta: Tensor, precision: Tensor, strength: Any):
        self.model, self.delta, self.precision, self.strength = model, delta, precision, float(strength)
        self.shape, self.dtype, self.device = (len(delta), len(delta)), delta.dtype, delta.device

    def __matmul__(self, v: Tensor) -> Tensor:
        diagonal = self.precision if v.dim() == 1 else self.precision.unsqueeze(1)
        return self.strength * self.model.curvature(self.delta, v) + diagonal * v


class _Preconditioner:
    def __init__(self, apply: Callable[[Tensor], Tensor], like: Tensor):
        self.apply, self.shape, self.dtype, self.device = apply, (len(like), len(like)), like.dtype, like.device

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.apply(v.T if v.dim() == 2 else v.unsqueeze(0)).T.reshape(v.shape)


def optimum(
    model: LinearisedModel | Restricted,
    precision: Tensor,
    strength: Any,
    start: Tensor | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    tol: float | None = None,
    most: tuple[int, int] | None = None,
) -> Tensor:
    """argmin over delta of strength * loss(f + J delta) + |theta + delta|^2_Lambda / 2, flat [D].

    Newton's method, each step by conjugate gradients and halved until the objective falls; one step for a squared
    error.  `precision` is Lambda's diagonal [D]; `preconditioner` maps rows [K, D] to (about) Sigma times them.
    Stops when the gradient's norm is below `tol` (default 1e-8; 1e-4 in float32) times its data part's, or after as
    many Newton steps, with as many products each, as `most` says.
    """
    theta, strength = model.theta, float(strength)
    tol = (1e-8 if theta.dtype == torch.float64 else 1e-4) if tol is None else tol
    delta = torch.zeros_like(theta) if start is None else start
    M = None if preconditioner is None else _Preconditioner(preconditioner, theta)

    def objective(d: Tensor) -> Tensor:
        return strength * model.value(d) + (precision * (theta + d).square()).sum() / 2

    value = objective(delta)
    exact = theta.dtype == torch.float64
    newton_steps, products = most or (NEWTON_STEPS, len(theta) if exact else min(len(theta), ROUGH_PRODUCTS))
    for _ in range(newton_steps):
        of_data = strength * model.gradient(delta)
        g = of_data + precision * (theta + delta)
        if g.norm() <= tol * max(of_data.norm(), (precision * theta).norm()):
            return delta
        A = _Precision(model, delta, precision, strength)
        # As exact as the quadratic model is: for a squared error, which is one, a single step is enough.
        inner = tol if model.is_quadratic else max(tol, min(0.1, (g.norm() / of_data.norm().clamp(min=1e-30)).item()))
        try:
            step = linalg.cg(A, -g, inner, max_iterations=products, preconditioner=M)
        except LinAlgError:  # rounding alone makes it indefinite: logits so large that float32 does not tell them apart
            step = -g / precision if M is None else M @ -g
        scale = 1.0
        for _ in range(HALVINGS):
            moved = delta + scale * step
            lower = objective(moved)
            if lower <= value:
                break
            scale /= 2
        else:
            return delta  # no descent left in this precision
        delta, value = moved, lower
    return delta
