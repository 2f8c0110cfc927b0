"""The Hessian in a call's output as signed squares of pulled-back vectors.

H_n = sum_v sign_v s_v s_v^T, pulled back from the output (the root of the loss's own Hessian: together they are the
generalised Gauss-Newton matrix), plus a diagonal matrix for every smooth elementwise activation behind the call, pulled
back to it.  Networks of (piecewise) linear layers have none.

The diagonal of an activation that follows a call reaches it as it is; one layer further down, through a linear layer W,
the diagonal of W^T diag(d) W is (W^2)^T d; only what lies deeper is pulled back, one column for each unit.
Source: the residuals of Dangel, Kunstner & Hennig 2020, arXiv:1912.10985.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from paraboloid.engine.many_vectors import gradients
from paraboloid.engine.per_sample import swapped
from paraboloid.engine.recorder import Call
from paraboloid.engine.sample_independence import Owned, certify
from paraboloid.graph.nodes import Bend, Graph
from paraboloid.graph.single_use import Parts, Recorded
from paraboloid.graph.weight_diagonal import coordinates, from_diagonal, meets_once, separable, units
from paraboloid.losses.loss import full
from paraboloid.passes.modes import autocast


@dataclass
class Spread:
    """How far the diagonal of one bend gets: to `closed` calls as a diagonal; to those of `far` (bits) otherwise."""

    bend: Bend
    closed: list[tuple[int, Tensor]]
    far: int
    columns: int


def spread(recorded: Recorded, graph: Graph, bend: Bend, parts: Parts) -> Spread:
    """Follow the bend's diagonal down to the calls below, once through a linear layer."""
    edge, d, whole = bend.below, bend.d, True  # whole: the matrix is diagonal, not only known on its diagonal
    result = Spread(bend, [], 0, d.numel() // len(recorded.f))
    while True:
        last = None
        for i, here, at in graph.descend(edge, d):
            edge, d = at, here
            if i is None:
                break
            able = meets_once if whole else separable
            if not all(able(part) for part in parts.get(i, {}).values()):
                result.far = graph.reach[at.node]
                return result
            result.closed.append((i, here))
            last = i
        at_call = last is not None and graph.calls.get((edge.node, edge.output_nr)) == last
        step = _through_linear(recorded.calls[last], d) if last is not None and at_call and whole else None
        if step is None:
            result.far = (graph.under if at_call else graph.reach)[edge.node]
            return result
        (edge, d), whole = step, False
        if not graph.reach.get(edge.node):
            return result


def _through_linear(call: Call, d: Tensor) -> tuple[GradientEdge, Tensor] | None:
    """The input's edge and the diagonal of J^T diag(d) J there, for a layer whose Jacobian J in its input has single
    entries of W: d pulled back through the same layer with W squared."""
    use = call.product()
    below = call.input_edge(use)
    if below is None or use is None or use.input is None or not use.is_plain or use.q_axes is not None:
        return None
    with torch.enable_grad(), autocast(d.device, call.autocast):
        x = use.input.detach().requires_grad_()
        exchanged = {id(use.input): x, id(use.weight): use.weight.detach().square()}
        z = call.op(*swapped(call.args, exchanged), **swapped(call.kwargs, exchanged))
        return below, torch.autograd.grad(z, x, d.to(z.dtype))[0].to(d.dtype)


def add_signed_root(recorded: Recorded, parts: Parts, signed: Set[int], found: dict[str, Tensor]) -> None:
    """Add the generalised Gauss-Newton part for a loss that need not be convex in the output."""
    vectors, signs = _signed_root(recorded)
    count = recorded.count(sum(c.shape.numel() for c in recorded.calls))
    for v, w in zip(vectors.split(count), signs.split(count), strict=True):
        outers = recorded.tape.pull(recorded.f, v)
        for name in (name for i in signed for name in parts[i]):
            (o,) = outers[name]
            found[name] += recorded.squares(o, w)


def _signed_root(recorded: Recorded) -> tuple[Tensor, Tensor]:
    """Vectors s_v [V *f] and signs [V, N] with sum_v sign_vn s_v[n] s_v[n]^T = H_n."""
    f = full(recorded.f)
    size = f[0].numel()
    eye = torch.eye(size, dtype=f.dtype, device=f.device).view(-1, 1, *f.shape[1:]).expand(-1, *f.shape)
    H = recorded.loss.hessian_product(f, recorded.y, eye).reshape(size, len(f), size).transpose(0, 1)
    values, vectors = torch.linalg.eigh((H + H.mT) / 2)
    root = vectors * values.abs().sqrt().unsqueeze(1)
    return root.permute(2, 0, 1).reshape(-1, *f.shape), values.sign().T


def add_bends(
    recorded: Recorded, parts: Parts, signed: Set[int], spreads: list[Spread], found: dict[str, Tensor]
) -> None:
    """Add what the smooth elementwise activations contribute."""
    diagonals: dict[int, Tensor] = {}
    for i, d in (closed for s in spreads for closed in s.closed if closed[0] in signed):
        diagonals[i] = diagonals[i] + d if i in diagonals else d
    for i, d in diagonals.items():
        for name, part in parts[i].items():
            found[name] += from_diagonal(part, d, recorded.each)
    bits = sum(1 << i for i in signed)
    far = [s for s in spreads if s.far & bits]
    if not far:
        return
    points = [SimpleNamespace(edge=s.bend.below, shape=s.bend.d.shape) for s in far]
    parameters = list(recorded.tape.parameters.values())
    layouts, _ = certify(recorded.f, points, parameters, lambda p: f"the input of {p.edge.node.name()}")
    for s, layout in zip(far, layouts, strict=True):
        if isinstance(layout, Owned):
            raise NotImplementedError("'diag_hessian': the samples lie along no axis of an activation of the model.")
        if layout is not None:
            at = coordinates(s.bend.d.shape, layout, recorded.f.device)
            _pull(recorded, parts, s.bend, at, [i for i in signed if s.far >> i & 1], found)


def _pull(recorded: Recorded, parts: Parts, bend: Bend, at: Tensor, calls: list[int], found: dict[str, Tensor]) -> None:
    """One column for each unit of the bend, pulled back to the given calls and squared with its sign."""
    edges = [recorded.calls[i].edge for i in calls]
    d = bend.d.flatten()[at.T]  # [V N]
    curved = d.abs().sum(1).nonzero().flatten()
    count = recorded.count(bend.d.numel() + sum(recorded.calls[i].shape.numel() for i in calls))
    for rows in curved.split(count) if len(curved) else ():  # none where the loss is flat in all that reaches it
        v = units(at.T[rows], d[rows].abs().sqrt(), bend.d.shape)
        pulled = gradients(bend.below, edges, v, not recorded.convolutional)
        for i, g in zip(calls, pulled, strict=True):
            if g is None:
                continue
            for name, part in parts[i].items():
                found[name] += recorded.squares(part.outer(g), d[rows].sign())
