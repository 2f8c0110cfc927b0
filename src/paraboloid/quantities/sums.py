"""What a batch adds up to before anything is divided: sums of batches, and of ranks, are those of one big batch.

Processes exchange sums over samples too: gradients, squares and factors before they are divided by anything.  So the
result is that of a single process with all samples, whatever the number of samples (and of ignored targets) of each.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paraboloid.distributed import collectives
from paraboloid.distributed.collectives import Group
from paraboloid.losses import Loss, NoTargets
from paraboloid.passes import trees
from paraboloid.quantities.quantity import Quantity, Scale

Values = dict[str, dict[str, Any]]  # quantity -> parameter -> running value
LeftOut = dict[str, tuple[float, float]]  # quantity -> the trace of the loss's Hessians: left out, and in all
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
    left_out: LeftOut = field(default_factory=dict)


def added_traces(parts: Sequence[LeftOut]) -> LeftOut:
    """Those of several batches, or ranks, together."""
    return {k: (sum(p[k][0] for p in parts), sum(p[k][1] for p in parts)) for k in parts[0]}


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
    counted = added_normalizers(loss, [a.normalizers, b.normalizers])
    return Sums(a.N + b.N, counted, a.loss + b.loss, values, gradient, added_traces([a.left_out, b.left_out]))


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


class Share(NamedTuple):
    """What a rank tells the others about its part of the batch."""

    N: int
    normalizers: list[float]
    loss: float
    used: list[bool]  # parameters that the output depends on
    structure: int  # of everything that is summed: equal on all ranks
    left_out: LeftOut


def check_summable(quantities: Sequence[Quantity]) -> None:
    """Raise ValueError for quantities that do not say how the values of several ranks make up one."""
    unknown = [q.name for q in quantities if q.over_ranks not in ("running", "local")]
    if unknown:
        raise ValueError(
            f"all_reduce: {unknown} cannot be combined over ranks; expected quantities whose class says how, with "
            "over_ranks = 'running' or 'local'. Ask for them without all_reduce."
        )


def combine(
    quantities: Sequence[Quantity], own: Sums, parameters: Mapping[str, Tensor], loss: Loss, device: torch.device,
    group: Group,
) -> tuple[Sums, Scale]:  # fmt: skip
    """Sum over ranks what is a sum over samples; with the scale of all samples.

    Raises ValueError, on all ranks, where they do not hold the same quantities of the same parameters, and for a sum of
    losses whose parts the ranks weigh differently.
    """
    used, grads = collectives.filled(own.gradient, parameters)
    tree = {q.name: own.values[q.name] for q in quantities if q.over_ranks == "running"}, grads if own.gradient else {}
    shares = collectives.gathered(Share(own.N, own.normalizers, own.loss, used, _structure(tree), own.left_out), group)
    if len({share.structure for share in shares}) > 1:
        raise ValueError(
            "all_reduce: the ranks do not hold the same quantities of the same parameters; expected the same model, "
            "arguments and trainable parameters on each, and calls in the same order."
        )
    scale = scale_of(loss, [(share.N, share.normalizers) for share in shares], "rank")
    values, total = collectives.summed(tree, group, device)
    used = collectives.used_anywhere([share.used for share in shares])
    gradient = {name: total[name] if total and there else None for name, there in zip(parameters, used, strict=True)}
    value = sum(share.loss for share in shares)
    left_out = added_traces([share.left_out for share in shares])
    return Sums(scale.N, own.normalizers, value, {**own.values, **values}, gradient, left_out), scale


def _structure(tree: Any) -> int:
    """A number that differs (almost surely) where names, shapes or types do; the same in every process."""
    described = trees.mapped(lambda t: f"{tuple(t.shape)} {t.dtype}", tree)
    return zlib.crc32(repr(described).encode())
