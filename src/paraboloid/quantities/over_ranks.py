"""Quantities of one big batch whose samples are spread over several processes.

What is exchanged are sums over samples: the gradients, squares and factors before they are divided by anything.  So the
result is that of a single process with all samples, whatever the number of samples (and of ignored targets) of each.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paraboloid.distributed import collectives
from paraboloid.losses import Loss, NoTargets
from paraboloid.losses.loss import full
from paraboloid.passes import trees
from paraboloid.quantities.named import Quantity, Scale

Values = dict[str, dict[str, Any]]  # quantity -> parameter -> running value


class Share(NamedTuple):
    """What a rank tells the others about its part of the batch."""

    N: int
    normalizers: list[float]  # of each of the loss's terms
    loss: float  # total of the unreduced loss
    used: list[bool]  # parameters that the output depends on
    structure: int  # of everything that is summed: equal on all ranks


class Combined(NamedTuple):
    """The big batch: its scale and loss, the running values that were summed, and the unreduced gradient."""

    scale: Scale
    loss: Tensor
    values: Values  # those of "finished" quantities are the finished ones at a = 1
    gradient: dict[str, Tensor | None]


def check_summable(quantities: Sequence[Quantity]) -> None:
    """Raise ValueError for quantities that do not say how the values of several ranks make up one."""
    unknown = [q.name for q in quantities if q.over_ranks not in ("running", "finished", "local")]
    if unknown:
        raise ValueError(
            f"all_reduce: {unknown} cannot be combined over ranks; expected quantities whose class says how, with "
            "over_ranks = 'running', 'finished' or 'local'. Ask for them without all_reduce."
        )


def combine(
    quantities: Sequence[Quantity], running: Values, gradient: Mapping[str, Tensor | None],
    parameters: Mapping[str, Tensor], loss: Loss, f: Tensor, y: Tensor, group: Any,
) -> Combined:  # fmt: skip
    """Sum over ranks what is a sum over samples.

    Raises ValueError, on all ranks, where they do not hold the same quantities of the same parameters, and for a sum of
    losses whose parts the ranks weigh differently.
    """
    local = Scale(len(f), 1.0)
    sums: Values = {q.name: running[q.name] for q in quantities if q.over_ranks == "running"}
    for q in quantities:
        if q.over_ranks == "finished":
            sums[q.name] = q.complete({k: q.finish(v, local) for k, v in running[q.name].items()}, local)
    used, grads = collectives.filled(gradient, parameters)
    tree = sums, grads if gradient else {}
    own = Share(len(f), _normalizers(loss, f, y), float(loss.sample_losses(full(f), y).sum()),
                used, _structure(tree))  # fmt: skip
    shares = collectives.gathered(own, group)
    if len({share.structure for share in shares}) > 1:
        raise ValueError(
            "all_reduce: the ranks do not hold the same quantities of the same parameters; expected the same model, "
            "arguments and trainable parameters on each, and calls in the same order."
        )
    normalizer = normalizer_of_all(shares, [term.reduction for term in loss.terms])
    values, total = collectives.summed(tree, group, f.device)
    used = collectives.used_anywhere([share.used for share in shares])
    value = sum(share.loss for share in shares) / normalizer
    return Combined(
        Scale(sum(share.N for share in shares), 1 / normalizer),
        torch.tensor(value, dtype=full(f).dtype, device=f.device),
        {**running, **values},
        {name: total[name] if total and there else None for name, there in zip(parameters, used, strict=True)},
    )


def _normalizers(loss: Loss, f: Tensor, y: Tensor) -> list[float]:
    terms = loss.terms
    try:
        return [term.normalizer(f, y) for term in terms]
    except NoTargets:  # the other ranks may have some
        if len(terms) > 1:
            raise
        return [0.0]


def normalizer_of_all(shares: Sequence[Share], reductions: Sequence[str]) -> float:
    """What the loss divides by on all samples: the ranks' normalizers add up, but for "sum".

    A sum of losses with different normalizers weighs their samples by N / m_i (see `losses.algebra.Sum`): its sums over
    samples belong together only where these weights are the same on every rank and on all of them.
    """
    parts = [[share.normalizers[i] for share in shares] for i in range(len(reductions))]
    totals = [m[0] if reduction == "sum" else sum(m) for m, reduction in zip(parts, reductions, strict=True)]
    N = sum(share.N for share in shares)
    if len(totals) > 1:
        weights = _weights(N, totals)
        for share in shares:
            own = _weights(share.N, share.normalizers)
            if not all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(own, weights, strict=True)):
                raise ValueError(f"all_reduce: the loss is a sum whose terms have the weights {own} on one rank and "
                                 f"{weights} on all of them; expected the same. Use terms with the same reduction and "
                                 "as many targets per sample on every rank.")  # fmt: skip
    normalizer = totals[0] if len(set(totals)) == 1 else float(N)
    if not normalizer:
        raise NoTargets("every target of every rank is ignored or has zero class weight, so the mean loss is 0/0; "
                        "leave such batches out or use reduction='sum'.")  # fmt: skip
    return normalizer


def _weights(N: int, normalizers: Sequence[float]) -> list[float]:
    return [1.0] * len(normalizers) if len(set(normalizers)) == 1 else [N / m for m in normalizers]


def _structure(tree: Any) -> int:
    """A number that differs (almost surely) where names, shapes or types do; the same in every process."""
    described = trees.mapped(lambda t: f"{tuple(t.shape)} {t.dtype}", tree)
    return zlib.crc32(repr(described).encode())
