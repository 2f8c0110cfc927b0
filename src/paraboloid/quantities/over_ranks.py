"""Quantities of one big batch whose samples are spread over several processes.

What is exchanged are sums over samples: the gradients, squares and factors before they are divided by anything.  So the
result is that of a single process with all samples, whatever the number of samples (and of ignored targets) of each.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paraboloid.distributed import collectives
from paraboloid.distributed.collectives import Group
from paraboloid.losses import Loss
from paraboloid.passes import trees
from paraboloid.quantities.quantity import Quantity, Scale
from paraboloid.quantities.sums import Sums, scale_of


class Share(NamedTuple):
    """What a rank tells the others about its part of the batch."""

    N: int
    normalizers: list[float]
    loss: float
    used: list[bool]  # parameters that the output depends on
    structure: int  # of everything that is summed: equal on all ranks


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
    shares = collectives.gathered(Share(own.N, own.normalizers, own.loss, used, _structure(tree)), group)
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
    return Sums(scale.N, own.normalizers, value, {**own.values, **values}, gradient), scale


def _structure(tree: Any) -> int:
    """A number that differs (almost surely) where names, shapes or types do; the same in every process."""
    described = trees.mapped(lambda t: f"{tuple(t.shape)} {t.dtype}", tree)
    return zlib.crc32(repr(described).encode())
