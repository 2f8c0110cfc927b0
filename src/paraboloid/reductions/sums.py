"""Sums of pulled-back vectors: each written once, for all layers and all pulled-back vectors.

`reduce` takes one parameter's vectors and the *parts* that are wanted of them, in the cheapest of their algebraically
equal forms, and shares what they have in common: unfolded inputs and formed samples.

    total    sum_{v,n} J_n^T v                  [*shape]
    squares  sum_{v,n} (J_n^T v)^2              [*shape]
    norms    sum_v ||J_n^T v||^2                [N]
    gram     sum_v (J_n^T v) . (J_m^T v)        [N, N]
    samples  J_n^T v                            [V, N, *shape]
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraboloid.passes.memory import PIECES, Limit
from paraboloid.reductions.outer import Outer

PARTS = frozenset({"total", "squares", "norms", "gram", "samples"})


@dataclass
class Recent:
    """What was computed last of a layer used at one position, and what of: its bias has the same gradients.

    Carried from parameter to parameter of one group of vectors.
    """

    factor: tuple[Tensor, Tensor] | None = None  # left [V N 1 1 p], its Gram matrix [1 p p]
    squares: tuple[Tensor, Tensor] | None = None  # left [V N G 1 p], its squares summed over V [N G 1 p]

    def factor_of(self, left: Tensor) -> Tensor | None:
        kept = self.factor
        return kept[1] if kept is not None and same_memory(kept[0], left) else None

    def squares_of(self, left: Tensor) -> Tensor:
        if (kept := self.squares) is not None and same_memory(kept[0], left):
            return kept[1]
        found = left[0].square()
        for v in range(1, left.shape[0]):
            found.addcmul_(left[v], left[v])
        self.squares = left, found
        return found


def same_memory(kept: Tensor, x: Tensor) -> bool:
    """Whether two tensors that live, so that their memory is their own, are the same numbers in the same order."""
    return kept.data_ptr() == x.data_ptr() and kept.shape == x.shape and kept.stride() == x.stride()


def reduce(o: Any, wanted: Set[str], max_memory: int | None = None, recent: Recent | None = None) -> dict[str, Tensor]:
    """The wanted parts, in pieces within `max_memory`; `recent` is carried from parameter to parameter of one
    group of vectors."""
    together = o.together(wanted)
    found = _together(o, together, max_memory) if together else {}
    for part in wanted:
        if part in together:
            continue
        if part == "total":
            found[part] = o.total(o.left.sum(0, keepdim=True) if o.left.shape[0] > 1 else o.left)[0]
        elif part == "squares":
            found[part] = o.squares(Recent() if recent is None else recent)
        elif part == "norms":
            found[part] = o.norms(max_memory)
        else:
            found[part] = o.gram() if part == "gram" else o.samples()
    return found


def _together(o: Outer, wanted: Set[str], max_memory: int | None) -> dict[str, Tensor]:
    """From the samples themselves, a piece at a time, which stays in the cache."""
    keep = bool(wanted & {"samples", "gram"})
    out, found, kept, norms = o.room() if keep else None, {}, [], []
    for _, J in o.blocks(max_memory, out):  # [n G V ..]
        if "total" in wanted:
            _increase(found, "total", J.sum((0, 2)))
        if keep and out is None:
            kept.append(J)
        if wanted & {"squares", "norms"}:
            J = J.square() if keep else J.square_()
            if "squares" in wanted:
                _increase(found, "squares", J.sum((0, 2)))
            if "norms" in wanted:
                norms.append(J.flatten(1).sum(1))
    found = {part: o.finish(J, ()) for part, J in found.items()}
    if norms:
        found["norms"] = torch.cat(norms)
    if keep:
        J = out if out is not None else torch.cat(kept) if len(kept) > 1 else kept[0]
        if "gram" in wanted:
            flat = J.flatten(1)
            found["gram"] = flat @ flat.mT
        if "samples" in wanted:
            found["samples"] = o.finish(J.movedim(2, 0), (J.shape[2], J.shape[0]))
    return found


def formed(o: Outer, max_memory: int | None, limit: Limit = PIECES) -> Tensor:
    """All samples, [N G V ..]."""
    out = o.room()
    kept = [J for _, J in o.blocks(max_memory, out, limit)]
    return out if out is not None else torch.cat(kept) if len(kept) > 1 else kept[0]


def _increase(found: dict[str, Tensor], part: str, J: Tensor) -> None:
    found[part] = found[part].add_(J) if part in found else J
