"""Kronecker factors of least Kullback-Leibler divergence: each side's sum weighted by the other's inverse."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.kronecker import Kron, Side
from paraboloid.optim.fisher_factors import FisherFactors
from paraboloid.quantities.quantity import Group, Scale
from paraboloid.reductions.kronecker_factors import Factors, Kept, gradient_factor, input_factor, scale_factors
from paraboloid.reductions.outer import Outer, Zero
from paraboloid.reductions.products import Lookup, Products, product
from paraboloid.reductions.right import Right


class KLFactors(FisherFactors):
    """`FisherFactors` in which a vector counts by the other side of its outer product, as the last inverses weigh it:

        left = a sum_{v,n,t} (r . R^-1 r) l l^T / q        right = sum_{v,n,t} w r r^T / sum_{v,n,t} w,   w = l . L^-1 l

    for pulled-back vectors l and inputs r.  Where L (x) R is left (x) right itself this is the Kronecker product with
    the least Kullback-Leibler divergence from sum a l l^T (x) r r^T, as covariances of a Gaussian distribution.  R^-1
    is damped, and the place of q has the trace of R^-1 times the factor that it was made of, which is q undamped.

    metrics  from a parameter's name to those inverses, divided by these traces; None, as long as there are none, and
             for parameters without two sides: plain factors

    Sources: Dutilleul 1999 (maximum likelihood of a matrix normal distribution); Lin et al. 2025, arXiv:2509.03378
    (the same for Shampoo's factors).
    """

    def __init__(self, names: Container[str], metrics: Callable[[str], Kron | None], **kept: Any):
        super().__init__(names, **kept)
        self.metrics = metrics
        self.sided: set[str] = set()  # parameters that have two sides, as far as they were seen

    def add(self, value: Any, group: Group) -> Any:
        if group.name not in self.names or not _has_sides(group.outer):
            return super().add(value, group)
        self.sided.add(group.name)
        metric = self.metrics(group.name)
        if metric is None:
            return super().add(value, group)
        with torch.no_grad():
            found = weighted(group.outer, metric, self.kept, group.memory)
        return found if value is None else self.merge(value, found)

    def merge(self, a: Any, b: Any) -> Any:
        if not isinstance(a, tuple) or not isinstance(b, tuple):  # plain, or without influence in one of the two
            return a if isinstance(a, tuple) else b if isinstance(b, tuple) else super().merge(a, b)
        return super().merge(a[0], b[0]), a[1] + b[1]

    def announce(self, values: Any) -> None:
        super().announce({k: v[0] if isinstance(v, tuple) else v for k, v in values.items()})

    def finish(self, value: Any, scale: Scale) -> Any:
        if not isinstance(value, tuple):
            return super().finish(value, scale)
        factors, weights = value
        share = (1 / weights).where(weights > 0, 0)
        sums = [{k: _shared(t, share) if k == "input" else t for k, t in side.items()}
                for side in (factors.rows, factors.columns)]  # fmt: skip
        return scale_factors(replace(factors, rows=sums[0], columns=sums[1], positions=torch.ones(())), scale.a)


def _has_sides(o: Outer) -> bool:
    """Whether both factors can be weighted: uses of one orientation, with blocks of one shape."""
    if o.bias_like or isinstance(o, Zero):
        return False
    return len({(use.flip, use.block) for use in o.products}) == 1


def weighted(o: Outer, metric: Kron, kept: Kept, memory: int | None) -> tuple[Factors, Tensor]:
    """Sums of the weighted factors of one group of vectors, and of the inputs' weights, [G]."""
    uses = [_reduced(use) if kept.sharing == "reduce" else use for use in o.products]
    rows, columns = metric.sides
    of_gradients, of_inputs = (columns, rows) if uses[0].flip else (rows, columns)
    each = replace(kept, sharing="expand")
    gradients, inputs, weights, positions = None, None, 0.0, 0
    for use in uses:
        by_input, by_gradient = _along_inputs(use, of_inputs, memory), _along_gradients(use, of_gradients)
        weights = weights + by_gradient.sum((0, 2)).to("cpu", torch.float64)
        positions += use.positions
        left = use.left * by_input.sqrt().unsqueeze(-1)
        gradients = _plus(gradients, gradient_factor(replace(use, left=left), each))
        inputs = _plus(inputs, _weighted_inputs(use, by_gradient, each, memory))
    G = uses[0].block[0]
    sides: Any = {"gradient": gradients}, {"input": inputs}
    rows, columns = sides[::-1] if uses[0].flip else sides
    return Factors(rows, columns, torch.tensor(positions, dtype=torch.float64, device="cpu"), G), torch.as_tensor(
        weights
    )


def _reduced(use: Products) -> Products:
    """One position: gradients summed, inputs averaged."""
    inputs = use.mean_inputs().unsqueeze(2)
    right = Right(lambda n: inputs[n], (1, len(inputs), 1), inputs.dtype)
    return product(use.left.sum(3, keepdim=True), right, use.shape, use.q, use.flip)


def _along_inputs(use: Products, metric: Side, memory: int | None) -> Tensor:
    """r . M r for every sample, group and position, [N G T]."""
    N, G, T = use.left.shape[1:4]
    if isinstance(use, Lookup):
        index = use.right()
        return metric.data[0][index.clamp(min=0)].to(use.left.dtype) * (index >= 0)
    found = use.left.new_empty(N, G, T)
    for n in use.chunks(G * T * use.q, memory):
        found[n] = _squared(use.columns(n), metric).unflatten(1, (-1, T)).transpose(0, 1)
    return found


def _along_gradients(use: Products, metric: Side) -> Tensor:
    """sum_v l . M l for every sample, group and position, [N G T]."""
    V, N, _, T, _ = use.left.shape
    found = _squared(use.left.permute(2, 4, 0, 1, 3).flatten(2), metric)
    return found.unflatten(1, (V, N, T)).sum(1).transpose(0, 1)


def _squared(x: Tensor, metric: Side) -> Tensor:
    """x . M x for the columns of x [G p K], [G K]; at least zero."""
    x = x.detach()
    full = x.to(metric.data.dtype)
    return (full * metric.times(full)).sum(1).clamp(min=0).to(x.dtype)


def _weighted_inputs(use: Products, weight: Tensor, kept: Kept, memory: int | None) -> Tensor | Side:
    """sum weight r r^T, [G q q], or its diagonal [G q]."""
    if isinstance(use, Lookup):
        index = use.right()
        found = weight.new_zeros(use.q)
        return found.index_add_(0, index.clamp(min=0).flatten(), (weight * (index >= 0)).flatten())[None]
    root = weight.sqrt().unsqueeze(-1)
    right = Right(lambda n: use.inputs(n) * root[n], (1, len(root), 1), use.left.dtype)
    return input_factor(product(use.left, right, use.shape, use.q, use.flip), kept, memory)


def _plus(sum_: Any, part: Any) -> Any:
    if sum_ is None:
        return part
    sum_, part = (t.dense() if isinstance(t, Side) else t for t in (sum_, part))
    return sum_ + part


def _shared(part: Tensor | Side, share: Tensor) -> Tensor | Side:
    """A sum divided by the sum of its weights, [G]."""
    data = part.data if isinstance(part, Side) else part
    share = share.to(data)
    return part.scaled(share) if isinstance(part, Side) else part * share.view(-1, *(1,) * (part.dim() - 1))
