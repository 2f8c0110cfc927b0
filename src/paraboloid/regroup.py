"""From a call's rule to its weights' outer products per sample: rows regrouped, broadcast axes summed, fallbacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraboloid.certify import Layout
from paraboloid.layers import RULES, Use
from paraboloid.outer import Outer, Right, general

Via = Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Part:
    """One weight of one call, ready for gradients g [V *z]; `root` is a parameter or derived from some."""

    root: Tensor
    outer: Callable[[Tensor, Via], Outer]


def rule_parts(call: Any, layout: Layout, alias: dict[int, Any]) -> list[Part] | None:
    """The parts of every weight of the call by its rule, or None where no rule applies to these arguments."""
    wanted = {id(w) for w in call.weights}
    uses = [u for u in RULES.get(call.op, lambda *_, **__: ())(*call.args, **call.kwargs) if id(u.weight) in wanted]
    if {id(u.weight) for u in uses} != wanted:
        return None
    parts = [_part(call.shape, layout, use, alias.get(id(use.weight))) for use in uses]
    return None if None in parts else parts


def _part(shape: torch.Size, layout: Layout, use: Use, alias: Any) -> Part | None:
    root, turned = (use.weight, False) if alias is None else (alias.root, alias.turned)
    axis, (a, N, b) = layout
    if use.shape is not None:
        if use.shape[axis] != shape[axis]:
            return None  # joined to the data along the samples' own axis
        shape = use.shape
    rows = broadcast_axes(shape, root.shape) if use.rows is None else use.rows
    if axis not in rows:
        return None  # the samples lie along an axis of the weight itself
    at, sizes = rows.index(axis), [shape[i] for i in rows]
    split = (math.prod(sizes[:at]) * a, N, b * math.prod(sizes[at + 1 :]))
    table = None if alias is None or use.right is not None else alias.table
    right = None if use.right is None else Right(use.right, split, use.lookup, root.dtype, use.q_axes)

    def outer(g: Tensor, via: Via) -> Outer:
        left = use.left(g)
        if use.rows is None:
            left = left.movedim([i + 1 for i in rows], list(range(1, len(rows) + 1)))
            left = left.reshape(len(g), -1, 1, 1, root.numel())
        left = left.unflatten(1, split).permute(0, 2, 4, 1, 3, 5, 6).flatten(3, 5)  # [V N G abT p]
        left = left.to(root.dtype)  # under autocast: sums in the weight's precision
        if table is not None:
            return _table_rows(left.sum(3, keepdim=True), *table)
        if right is None:
            return Outer(left.sum(3, keepdim=True), None, root.shape, via=via, kind="vector")
        return Outer(left, right, root.shape, use.q, use.flip ^ turned, via)

    return Part(root if table is None else table[0], outer)


def _table_rows(left: Tensor, table: Tensor, positions: Tensor) -> Outer:
    """Added rows of an embedding table at positions that all samples share: each row of the sum is one lookup."""
    V, N = left.shape[:2]
    index = positions.reshape(1, 1, -1).expand(N, 1, -1)
    right = Right(lambda rows: index[rows], (1, N, 1), lookup=True)
    return Outer(left.reshape(V, N, 1, -1, table.shape[1]), right, table.shape, len(table), flip=True)


def broadcast_axes(shape: torch.Size, weight: torch.Size) -> tuple[int, ...]:
    """Axes of the output along which a weight of the given shape is broadcast (aligned from the right)."""
    lead = len(shape) - len(weight)
    return tuple(i for i in range(len(shape)) if i < lead or weight[i - lead] == 1)


def fallback_parts(call: Any, layout: Layout) -> list[Part]:
    """Any call: the vector-Jacobian product of the operation itself, once per sample."""
    axis, (a, N, b) = layout

    def outer(w: Tensor, g: Tensor, via: Via) -> Outer:
        mask = torch.eye(N, dtype=g.dtype, device=g.device)[:, None, :, None].expand(N, a, N, b).reshape(N, -1)
        mask = mask.view(N, *[1] * axis, a * N * b, *[1] * (len(call.shape) - axis - 1))
        with torch.enable_grad():
            fresh = {id(t): t.detach().requires_grad_() for t in call.weights}
            z = call.op(*_swap(call.args, fresh), **_swap(call.kwargs, fresh))
            J = vjp(z, fresh[id(w)], (g[:, None] * mask).flatten(0, 1))
        J = J.unflatten(0, (len(g), N)).to(w.dtype)
        if via is None:
            return general(J, w.shape)
        return Outer(J.flatten(2)[:, :, None, None], None, w.shape, via=via, kind="general")

    weights = {id(w): w for w in call.weights}.values()
    return [Part(w, lambda g, via, w=w: outer(w, g, via)) for w in weights]


def _swap(tree: Any, fresh: dict[int, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return fresh.get(id(tree), tree.detach())
    if isinstance(tree, dict):
        return {k: _swap(t, fresh) for k, t in tree.items()}
    if isinstance(tree, tuple | list):
        return (tuple if isinstance(tree, tuple) else list)(_swap(t, fresh) for t in tree)
    return tree


def vjp(z: Tensor, p: Tensor, gs: Tensor) -> Tensor:
    """Vector-Jacobian products of z(p): [B *z] -> [B *p]; batched where the operations allow it."""
    with torch.enable_grad():
        try:
            (r,) = torch.autograd.grad(z, p, gs, retain_graph=True, is_grads_batched=True, allow_unused=True)
        except RuntimeError:  # an operation without a batching rule
            each = [torch.autograd.grad(z, p, u, retain_graph=True, allow_unused=True)[0] for u in gs]
            r = None if each[0] is None else torch.stack(each)
    return p.new_zeros(len(gs), *p.shape) if r is None else r
