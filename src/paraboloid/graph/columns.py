"""Diagonals of Hessians from their columns, by double backward passes: always possible, and one column at a time.

The samples are independent, so a product with one unit vector in every sample's z gives one column of every H_n at
once.  Where a parameter has fewer elements than a call's output, its own columns are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paraboloid.engine.many_vectors import gradients
from paraboloid.engine.sample_independence import Layout
from paraboloid.graph.single_use import Parts, Recorded
from paraboloid.graph.weight_diagonal import coordinates, from_diagonal, from_products, output_diagonal, separable
from paraboloid.losses import Loss


class Gradients:
    """The gradient of sum_n l_n, or of one l_n, in each of `inputs` (parameters, or graph edges), with its graph."""

    def __init__(self, loss: Loss, f: Tensor, y: Tensor, inputs: Sequence[Any], batched: bool, n: int | None = None):
        self.inputs, self.batched = inputs, batched
        with torch.enable_grad():
            wide = f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
            losses = loss.sample_losses(wide, y)
            total = losses.sum() if n is None else losses[n]
            self.g = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)

    def products(self, i: int, v: Tensor) -> Tensor:
        """H v for columns v [V *shape of inputs[i]], H the Hessian in inputs[i]."""
        g = self.g[i]
        if g is None or not g.requires_grad:
            return torch.zeros_like(v)
        (h,) = gradients(g, self.inputs[i], v.to(g.dtype), self.batched)
        return torch.zeros_like(v) if h is None else h.to(v.dtype)

    def diagonal(self, i: int, count: int) -> Tensor:
        """The diagonal of the Hessian in inputs[i], a parameter: one product for each of its elements."""
        p = self.inputs[i]
        d = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
        for rows in torch.arange(p.numel(), device=p.device).split(count):
            v = torch.zeros(len(rows), p.numel(), dtype=p.dtype, device=p.device).scatter_(1, rows.unsqueeze(1), 1.0)
            d[rows] = (
                self.products(i, v.view(-1, *p.shape)).reshape(len(rows), -1).gather(1, rows.unsqueeze(1)).squeeze(1)
            )
        return d.view(p.shape)


def add_columns(
    recorded: Recorded, parts: Parts, calls: Sequence[int], names: list[str], found: dict[str, Tensor]
) -> None:
    """The diagonals of the parameters of some calls, and of the parameters of the given names."""
    tape, f = recorded.tape, recorded.f
    ways = {i: _ways(recorded, parts, i) for i in calls}
    by_output = [i for i, way in ways.items() if set(way.values()) - {"parameter"}]
    names = [*names, *(name for way in ways.values() for name, kind in way.items() if kind == "parameter")]
    if not by_output and not names:
        return
    inputs = [*(recorded.calls[i].edge for i in by_output), *(tape.parameters[name] for name in names)]
    hessian = Gradients(recorded.loss, f, recorded.y, inputs, batched=not recorded.convolutional)
    count = recorded.count(2 * sum(c.shape.numel() for c in recorded.calls))
    for j, i in enumerate(by_output):
        products, shape, like = partial(hessian.products, j), recorded.calls[i].shape, f.new_empty(0)
        if "diagonal" in ways[i].values():
            layout = recorded.plan.layouts[i]
            assert isinstance(layout, Layout)  # see `single_uses`
            d = output_diagonal(products, shape, coordinates(shape, layout, f.device), count, like)
            found |= {name: from_diagonal(parts[i][name], d, recorded.each) for name in ways[i]}
        for name, kind in ways[i].items():
            if kind == "positions":
                found[name] = from_products(parts[i][name], products, shape, count, like, recorded.each)
    if not recorded.each:
        found |= {name: hessian.diagonal(j, count) for j, name in enumerate(names, len(by_output))}
        return
    own = {name: [] for name in names}
    for n in range(len(f)) if names else ():
        hessian = Gradients(recorded.loss, f, recorded.y, inputs[len(by_output) :], hessian.batched, n)
        for j, name in enumerate(names):
            own[name].append(hessian.diagonal(j, count))
    found |= {name: torch.stack(diagonals) for name, diagonals in own.items()}


def products_needed(recorded: Recorded, parts: Parts, i: int) -> int:
    """About how many products with the Hessian a call takes."""
    sizes = [recorded.tape.parameters[name].numel() for name in parts[i]]
    return min(recorded.calls[i].shape.numel() // len(recorded.f), sum(sizes))


def _ways(recorded: Recorded, parts: Parts, i: int) -> dict[str, str]:
    """How each parameter of a call gets its columns.

    "diagonal": from the diagonal of H_n, one product per element of z_n, for all of the call's parameters (T = 1).
    "positions": from the T x T blocks of H_n, one product per element too.  "parameter": from its own columns.
    """
    parameters, N = recorded.tape.parameters, len(recorded.f)
    fewer = recorded.calls[i].shape.numel() // N < sum(parameters[name].numel() for name in parts[i])
    if fewer and all(separable(part) for part in parts[i].values()):
        return dict.fromkeys(parts[i], "diagonal")
    ways = dict.fromkeys(parts[i], "parameter")
    for name, part in parts[i].items():
        if part.use is not None and part.use.right is not None and part.elements is not None:
            columns = part.elements()[0].numel() // N
            many = parameters[name].numel() * (N if recorded.each else 1)
            able = not (recorded.each and part.use.lookup)
            ways[name] = "positions" if able and columns < many else "parameter"
    return ways
