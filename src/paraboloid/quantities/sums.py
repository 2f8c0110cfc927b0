"""What a batch adds up to before anything is divided: sums of batches, and of ranks, are those of one big batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.kronecker import Kron
from paraboloid.losses import Loss, NoTargets
from paraboloid.losses.loss import full
from paraboloid.passes import trees
from paraboloid.quantities.quantity import Quantity, Scale

Values = dict[str, dict[str, Any]]  # quantity -> parameter -> running value
Gradient = dict[str, Tensor | None]  # of the unreduced loss, summed over samples; None without influence


@dataclass
class Sums:
    """Of N samples: what each of the loss's terms divides by, the total of the unreduced loss, running values, and the
    gradient if it is to be accumulated."""

    N: int
    normalizers: list[float]
    loss: float
    values: Values
    gradient: Gradient


def sums_of(loss: Loss, f: Tensor, y: Tensor, values: Values, gradient: Gradient) -> Sums:
    """Those of one batch.  Where all of its targets are ignored the normalizer is 0: others may have some."""
    try:
        normalizers = [term.normalizer(f, y) for term in loss.terms]
    except NoTargets:
        if len(loss.terms) > 1:
            raise
        normalizers = [0.0]
    return Sums(len(f), normalizers, float(loss.sample_losses(full(f), y).sum()), values, gradient)


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


@torch.no_grad()
def finished(q: Quantity, values: Mapping[str, Any], parameters: Mapping[str, Tensor], scale: Scale) -> dict[str, Any]:
    """A quantity's values, in the parameters' types: the sums of one in half precision were kept in float32."""
    return {k: _in(parameters[k].dtype, q.finish(v, scale)) for k, v in values.items()}


def _in(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Kron) else trees.mapped(lambda t: t.to(dtype), value)
