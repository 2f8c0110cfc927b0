"""The Jacobian of a batch's outputs in outer-product form, and its contractions with a diagonal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Inputs, Output
from paraboloid.engine.outer_products import Outer, merge
from paraboloid.engine.tape import Tape, record
from paraboloid.passes import trees
from paraboloid.passes.memory import CACHED
from paraboloid.passes.random_state import isolated
from paraboloid.passes.wrappers import unwrapped
from paraboloid.posteriors.weights import only
from paraboloid.reductions.sums import pieces

SAMPLES = 128  # of products that are made at a time, to stay in the cache


@dataclass
class Jacobian:
    """d f_k / d theta of every sample for the K elements of its output, by parameter: V = K vectors are pulled back.

    `outputs` are f [N, *shape], detached; `uses[name]` the parameter's outer products.
    """

    outputs: Tensor
    uses: dict[str, list[Outer]]
    parameters: Mapping[str, Tensor]

    def dense(self) -> Tensor:
        """[N, K, D]."""
        parts = [torch.cat([J for _, J in pieces(uses, None)], 1).flatten(2) for uses in self.uses.values()]
        return torch.cat(parts, 2).transpose(0, 1)

    def times(self, rows: Tensor) -> Tensor:
        """J r for the rows r of a [R, D] tensor, [N, K, R], without forming J where a layer has a single position."""
        found: Tensor | None = None
        for uses, part in zip(
            self.uses.values(), rows.split([p.numel() for p in self.parameters.values()], 1), strict=True
        ):
            added = _times(merge(uses), part)
            found = added if found is None else found.add_(added)
        assert found is not None
        return found


def _times(uses: list[Outer], rows: Tensor) -> Tensor:
    """J r of one parameter, [N, K, R]."""
    o, R = uses[0], len(rows)
    if len(uses) > 1 or o.via is not None or o.kind != "matrix" or o.lookup or o.left.shape[2:4] != (1, 1):
        return torch.cat([J @ rows.T for J in rows_of(uses, None)])
    assert o.right is not None
    p, right = o.left.shape[4], o.right().flatten(1)  # [N q]
    left = o.left.flatten(2).transpose(0, 1)  # [N V p]
    blocks = rows.view(R, o.q, p).mT if o.flip else rows.view(R, p, o.q)
    N, on_cpu = len(right), right.device.type == "cpu"
    step = min(N, SAMPLES) if on_cpu else N
    rows_at_a_time = CACHED.count(step * p * rows.element_size(), device=right.device)
    found = right.new_empty(N, len(o.left), R)
    for start in range(0, R, rows_at_a_time):
        some = blocks[start : start + rows_at_a_time]
        flat = some.reshape(-1, o.q).T
        for n in (slice(first, first + step) for first in range(0, N, step)):
            inner = (right[n] @ flat).view(-1, len(some), p)  # [n r p]
            found[n, :, start : start + len(some)] = left[n] @ inner.mT
    return found


@contextmanager
def recorded(
    model: nn.Module, names: list[str], inputs: Inputs, output: Output | None, verify: str | bool = "auto"
) -> Iterator[tuple[Tape, Tensor]]:
    """(tape, f) of a forward pass in evaluation of the chosen weights' Jacobian; the model is left as it was."""
    device = next(iter(trees.parameters(model).values())).device
    with only(model, names), isolated(model, device, 0), torch.inference_mode(False), torch.enable_grad():
        with record(model, verify) as tape:
            f = batch_data.call(unwrapped(model), inputs, output)
        yield tape, f


def pull_outputs(tape: Tape, f: Tensor, elements: range | None = None) -> Jacobian:
    """The Jacobian of the output elements in `elements` (default: all K)."""
    size = f[0].numel()
    chosen = torch.arange(size, device=f.device) if elements is None else torch.tensor(list(elements), device=f.device)
    v = f.new_zeros(len(chosen), 1, size)
    v[torch.arange(len(chosen)), 0, chosen] = 1
    v = v.expand(-1, len(f), -1).reshape(-1, *f.shape)
    return Jacobian(f.detach(), tape.pull(f, v), tape.parameters)


def weighted_gram(uses: list[Outer], W: Tensor, diagonal: bool = False, memory: int | None = None) -> Tensor:
    """sum_d J[n, k, d] W[d] J[n, l, d] over the elements d of one parameter, [N, K, K]; its diagonal [N, K] if asked.

    W has the parameter's shape (any shape of so many elements).  Outer products with a single position are never
    formed: the sum over q runs first, (r^2 W^T) [N, p].
    """
    uses = merge(uses)
    o = uses[0]
    if len(uses) == 1 and o.via is None and o.kind == "matrix" and not o.lookup and o.left.shape[3] == 1:
        assert o.right is not None
        G, p = o.left.shape[2], o.left.shape[4]
        weights = W.reshape(G, o.q, p).mT if o.flip else W.reshape(G, p, o.q)
        right = o.right().squeeze(2).square().transpose(0, 1)  # [G N q]
        inner = (right @ weights.mT).transpose(0, 1).flatten(1)  # [N Gp]
        left = o.left.squeeze(3).flatten(2).transpose(0, 1)  # [N V Gp]
        return gram(left, inner.unsqueeze(1), diagonal)
    return torch.cat([gram(J, W.reshape(1, 1, -1), diagonal) for J in rows_of(uses, memory)])


def rows_of(uses: list[Outer], memory: int | None) -> Iterator[Tensor]:
    """J of one parameter, [n V D], for consecutive ranges of samples."""
    o = uses[0]
    if len(uses) == 1 and o.right is None and o.via is None and o.left.shape[3] == 1:  # it is there already
        yield o.left.flatten(2).transpose(0, 1)
        return
    for _, J in pieces(uses, memory):
        yield J.flatten(2).transpose(0, 1)


def gram(left: Tensor, weights: Tensor | float, diagonal: bool) -> Tensor:
    """sum_d left[n, v, d] weights[n, d] left[n, u, d], [n V V], for left [n V d] and weights [n or 1, 1, d]; or its
    diagonal [n V]."""
    if not diagonal:
        return (left * weights) @ left.mT
    d = left.shape[2]
    if not isinstance(weights, Tensor):
        return weights * _squares(left, left.new_ones(d))
    if len(weights) == 1:
        return _squares(left, weights[0, 0])
    V_first, ones, w = left.transpose(0, 1), left.new_ones(d), weights[:, 0]  # [V n d], [n d]
    step = CACHED.count(w.shape.numel() * left.element_size(), device=w.device)
    return torch.cat([piece.square().mul_(w) @ ones for piece in V_first.split(step)]).T


def _squares(left: Tensor, w: Tensor) -> Tensor:
    """sum_d left[n, v, d]^2 w[d], [n V], in pieces that stay in the cache, along the order in memory."""
    swap = left.transpose(0, 1).is_contiguous()
    rows = (left.transpose(0, 1) if swap else left).reshape(-1, len(w))
    step = CACHED.count(len(w) * left.element_size(), device=w.device)
    found = torch.cat([piece.square() @ w for piece in rows.split(step)])
    return found.view(left.shape[1], -1).T if swap else found.view(left.shape[:2])
