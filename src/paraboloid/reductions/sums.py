"""Reductions of outer products: each written once, for all layers and all pulled-back vectors.

`reduce` takes one parameter's uses and the *parts* that are wanted of them, picks the cheapest of their algebraically
equal forms from the shapes alone, and shares what they have in common: unfolded inputs and materialised samples.

    total    sum_{v,n} J_n^T v                  [*shape]
    squares  sum_{v,n} (J_n^T v)^2              [*shape]
    norms    sum_v ||J_n^T v||^2                [N]
    gram     sum_v (J_n^T v) . (J_m^T v)        [N, N]
    samples  J_n^T v                            [V, N, *shape]
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paraboloid.engine.outer_products import Outer, merge
from paraboloid.passes.memory import pooled

PARTS = frozenset({"total", "squares", "norms", "gram", "samples"})


@dataclass
class Recent:
    """What was computed last of a layer used at one position, and what of: its bias has the same gradients."""

    factor: tuple[Tensor, Tensor] | None = None  # left [V N 1 1 p], its Gram matrix [1 p p]
    squares: tuple[Tensor, Tensor] | None = None  # left [V N G 1 p], its squares summed over V [N G 1 p]

    def factor_of(self, left: Tensor) -> Tensor | None:
        return _found(self.factor, left)

    def squares_of(self, left: Tensor) -> Tensor:
        found = _found(self.squares, left)
        if found is None:
            found = left[0].square()
            for one in left[1:]:
                found.addcmul_(one, one)
            self.squares = left, found
        return found


def _found(kept: tuple[Tensor, Tensor] | None, left: Tensor) -> Tensor | None:
    return kept[1] if kept is not None and same_memory(kept[0], left) else None


def same_memory(kept: Tensor, x: Tensor) -> bool:
    """Whether two tensors that live, so that their memory is their own, are the same numbers in the same order."""
    return kept.data_ptr() == x.data_ptr() and kept.shape == x.shape and kept.stride() == x.stride()


def samples(outers: list[Outer], n: slice = slice(None)) -> Tensor:
    """J_n^T v, [V n *shape]."""
    result = outers[0].samples(n)
    for o in outers[1:]:
        result = result + o.samples(n)
    return result


def pieces(outers: list[Outer], memory: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive ranges of samples and their J_n^T v, [V n *shape]."""
    V = outers[0].left.shape[0]
    size = max(V * outers[0].shape.numel(), *(o.left.shape[2] * o.left.shape[3] * o.q for o in outers))
    for n in outers[0].chunks(size, memory):
        yield n, samples(outers, n)


def reduce(
    outers: list[Outer], wanted: Set[str], memory: int | None = None, recent: Recent | None = None
) -> dict[str, Tensor]:
    """The wanted parts of one parameter's uses, in pieces of at most `memory` bytes; `recent` is carried from parameter
    to parameter of one group of vectors."""
    outers = merge(outers)
    o = outers[0]
    if len(outers) > 1 or o.via is not None:
        return _materialised(outers, wanted, memory)
    if o.lookup:
        return _of_lookup(o, wanted, memory)
    if o.right is None or o.left.shape[3] == 1:
        return _one_position(o, wanted, Recent() if recent is None else recent)
    return _many_positions(o, wanted, memory)


def _one_position(o: Outer, wanted: Set[str], recent: Recent) -> dict[str, Tensor]:
    """T = 1 (or a bias-like parameter, whose positions are summed): everything factorises.

    The square of an outer product is the outer product of squares; its norm the product of norms.
    """
    found = {}
    left = o.left  # [V N G 1 p]
    right = None if o.right is None else o.right()  # [N G 1 q]
    if "total" in wanted:
        found["total"] = replace(o, left=left.sum(0, keepdim=True) if len(left) > 1 else left).total()[0]
    if "squares" in wanted:
        squared = None if o.right is None else replace(o.right, rows=_squared(o.right.rows), _kept=None)
        found["squares"] = replace(o, left=recent.squares_of(left)[None], right=squared).total()[0]
    if "norms" in wanted:
        inner = torch.linalg.vector_norm(left, dim=(0, 3, 4)).square()  # [N G]
        found["norms"] = (inner if right is None else inner * torch.linalg.vector_norm(right, dim=(2, 3)).square()).sum(
            1
        )
    if "gram" in wanted:
        side = left.movedim(1, 2).flatten(3)  # [V G N p]
        inner = (side @ side.mT).sum(0)
        if right is not None:
            side = right.transpose(0, 1).flatten(2)
            inner = inner * (side @ side.mT)
        found["gram"] = inner.sum(0)
    if "samples" in wanted:
        found["samples"] = o.samples()
    return found


def _squared(rows):
    return lambda n: rows(n).square()


def coalesce(o: Outer) -> tuple[Tensor, Tensor, Tensor]:
    """A lookup's rows summed per sample: (sample [U], table row [U], value [V U p]) for the pairs that occur."""
    V, N, G, T, p = o.left.shape
    assert o.right is not None
    key = (torch.arange(N, device=o.left.device)[:, None] * o.q + o.right().flatten(1).clamp(min=0)).flatten()
    pairs, inverse = key.unique(return_inverse=True)
    value = o.left.new_zeros(V, len(pairs), p).index_add_(1, inverse, o.left.reshape(V, N * G * T, p))
    return pairs // o.q, pairs % o.q, value


def _of_lookup(o: Outer, wanted: Set[str], memory: int | None) -> dict[str, Tensor]:
    """A lookup touches few rows of its table per sample: sums over the pairs (sample, row) that occur."""
    found = {}
    if "total" in wanted:
        found["total"] = replace(o, left=o.left.sum(0, keepdim=True)).total()[0]
    if wanted & {"squares", "norms"}:
        sample, row, value = coalesce(o)
        square = value.square().sum(0)
        if "squares" in wanted:
            J = square.new_zeros(o.q, square.shape[1]).index_add_(0, row, square)
            found["squares"] = (J if o.flip else J.mT).reshape(o.shape)
        if "norms" in wanted:
            found["norms"] = square.new_zeros(o.left.shape[1]).index_add_(0, sample, square.sum(1))
    return found | _materialised([o], wanted & {"gram", "samples"}, memory)


def _many_positions(o: Outer, wanted: Set[str], memory: int | None) -> dict[str, Tensor]:
    """Sequences and convolutions: samples are materialised a piece at a time, unless no part needs them."""
    assert o.right is not None
    V, N, G, T, p = o.left.shape
    q, found = o.q, {}
    if not wanted & {"squares", "samples", "gram"}:
        short = T * (p + q) < p * q  # the Gram trick: Goodfellow 2015, arXiv:1510.01799
        if "norms" not in wanted or short:
            if "norms" in wanted:
                parts = []
                for n in o.chunks(G * (T * q + (V + 1) * T * T), memory):
                    left, right = o.left[:, n], o.right(n)
                    parts.append(((left @ left.mT) * (right @ right.mT)).sum((0, 2, 3, 4)))
                found["norms"] = torch.cat(parts)
            if "total" in wanted:
                found["total"] = o.total().sum(0)
            return found
    total = o.left.new_zeros(G, p, q) if "total" in wanted else None
    squares = o.left.new_zeros(G, p, q) if "squares" in wanted else None
    norms = o.left.new_empty(N) if "norms" in wanted else None
    kept = pooled((N, G, V * p, q), o.left) if wanted & {"samples", "gram"} else None
    buffer = None
    for n in o.chunks(G * max(V * p * q, T * q), memory):
        left = o.left[:, n].permute(1, 2, 0, 4, 3).flatten(2, 3).flatten(0, 1)  # [nG Vp T]
        right = o.right(n).flatten(0, 1)  # [nG T q]
        if kept is not None:
            J = torch.bmm(left, right, out=kept[n].flatten(0, 1))
        else:
            if buffer is None:
                buffer = o.left.new_empty(left.shape[0], V * p, q)
            J = torch.bmm(left, right, out=buffer[: left.shape[0]])
        J = J.view(-1, G, V, p, q)
        if total is not None:
            total += J.sum((0, 2))
        if squares is not None or norms is not None:
            J = J.square() if kept is not None else J.square_()
            if squares is not None:
                squares += J.sum((0, 2))
            if norms is not None:
                norms[n] = J.flatten(1).sum(1)
    if total is not None:
        found["total"] = o.finish(total, (1,))[0]
    if squares is not None:
        found["squares"] = o.finish(squares, (1,))[0]
    if norms is not None:
        found["norms"] = norms
    if kept is not None:
        J = kept.view(N, G, V, p, q)
        if "gram" in wanted:
            flat = J.transpose(1, 2).flatten(2)
            found["gram"] = flat.flatten(1) @ flat.flatten(1).mT
        if "samples" in wanted:
            found["samples"] = o.finish(J.movedim(2, 0), (V, N))
    return found


def _materialised(outers: list[Outer], wanted: Set[str], memory: int | None) -> dict[str, Tensor]:
    """Whatever the uses are: several of different shape, derived weights.  A piece at a time."""
    found: dict[str, Tensor] = {}
    kept = []
    for _, J in pieces(outers, memory) if wanted else ():
        if "total" in wanted:
            _increase(found, "total", J.sum((0, 1)))
        if wanted & {"squares", "norms"}:
            square = J.square()
            if "squares" in wanted:
                _increase(found, "squares", square.sum((0, 1)))
            if "norms" in wanted:
                norms = square.flatten(2).sum((0, 2))
                found["norms"] = torch.cat([found["norms"], norms]) if "norms" in found else norms
        if wanted & {"samples", "gram"}:
            kept.append(J)
    if kept:
        J = torch.cat(kept, 1) if len(kept) > 1 else kept[0]
        if "gram" in wanted:
            found["gram"] = (J.flatten(2) @ J.flatten(2).mT).sum(0)
        if "samples" in wanted:
            found["samples"] = J
    return found


def _increase(found: dict[str, Tensor], name: str, part: Tensor) -> None:
    found[name] = found[name].add_(part) if name in found else part
