"""What a batch adds up to before anything is divided: sums of batches, and of ranks, are those of one big batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from paraboloid.losses import Loss, NoTargets
from paraboloid.quantities.quantity import Quantity, Scale

Values = dict[str, dict[str, Any]]  # quantity -> parameter -> running value
Gradient = dict[str, Tensor | None]  # of the unreduced loss, summed over samples; None without influence


@dataclass
class Sums:
    """Of N samples: what each of the loss's terms divides by (0 where all targets are ignored: others may have some),
    the total of the unreduced loss, running values, and the gradient if it is to be accumulated."""

    N: int
    normalizers: list[float]
    loss: float
    values: Values
    gradient: Gradient


def normalizers(loss: Loss, f: Tensor, y: Tensor) -> list[float]:
    """What each term divides by on one batch."""
    f = f.detach()
    try:
        return [term.normalizer(f, y) for term in loss.terms]
    except NoTargets:
        if len(loss.terms) > 1:
            raise
        return [0.0]


def merged(quantities: Sequence[Quantity], loss: Loss, a: Sums | None, b: Sums) -> Sums:
    """The sums of two batches as those of one, the samples of `a` first."""
    if a is None:
        return b
    values = {q.name: {k: q.merge(v, b.values[q.name][k]) for k, v in a.values[q.name].items()} for q in quantities}
    gradient = {k: g if (h := b.gradient[k]) is None else h if g is None else g + h for k, g in a.gradient.items()}
    return Sums(a.N + b.N, added_normalizers(loss, [a.normalizers, b.normalizers]), a.loss + b.loss, values, gradient)


def added_normalizers(loss: Loss, parts: Sequence[Sequence[float]]) -> list[float]:
    """What each term divides by on all samples: the parts' normalizers add up, but for "sum"."""
    each = zip(loss.terms, zip(*parts, strict=True), strict=True)
    return [m[0] if term.reduction == "sum" else sum(m) for term, m in each]


def scale_of(loss: Loss, shares: Sequence[tuple[int, Sequence[float]]], of: str) -> Scale:
    """The scale of a big batch from the samples and normalizers of its parts (each batch, or each rank).

    A sum of losses with different normalizers weighs their samples by N / m_i (see `losses.Sum`): its sums over samples
    belong together only where these weights are the same in every part and on all of them; ValueError where not.
    """
    N, totals = sum(n for n, _ in shares), added_normalizers(loss, [m for _, m in shares])
    if len(totals) > 1:
        weights = _weights(N, totals)
        for own in (_weights(*share) for share in shares):
            if not all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(own, weights, strict=True)):
                raise ValueError(f"all_reduce: the loss is a sum whose terms have the weights {own} on one rank and "
                                 f"{weights} on all of them; expected the same. Use terms with the same reduction and "
                                 "as many targets per sample on every rank.")  # fmt: skip
    normalizer = totals[0] if len(set(totals)) == 1 else float(N)
    if not normalizer:
        raise NoTargets(f"every target of every {of} is ignored or has zero class weight, so the mean loss is 0/0; "
                        "leave such batches out or use reduction='sum'.")  # fmt: skip
    return Scale(N, 1 / normalizer)


def _weights(N: int, normalizers: Sequence[float]) -> list[float]:
    return [1.0] * len(normalizers) if len(set(normalizers)) == 1 else [N / m for m in normalizers]
