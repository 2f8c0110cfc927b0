"""Mean and spread of single-sample gradients over batches, coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Batch, Output
from paraboloid.losses import Loss
from paraboloid.passes import trees
from paraboloid.quantities.door import statistics
from paraboloid.quantities.result import Statistics


class Moments(NamedTuple):
    """N samples; mean and sum of squared deviations from it, float64, for each parameter."""

    samples: int
    mean: dict[str, Tensor]
    squares: dict[str, Tensor]


def moments(
    model: nn.Module, loss: Loss, batches: Iterable[Batch], output: Output | None = None, max_memory: int | None = None
) -> Moments:
    """Of the gradients of the unreduced loss; one forward pass and one pull for each batch.

    Batches are merged by the update of Chan, Golub and LeVeque 1979, which does not subtract large numbers.
    """
    mean = {k: torch.zeros_like(p, dtype=torch.float64) for k, p in trees.parameters(model).items()}
    squares = {k: torch.zeros_like(m) for k, m in mean.items()}
    seen = 0
    for batch in batches:
        wanted = ["grad", "variance"] if len(batch[1]) > 1 else ["grad"]  # a single sample has no variance
        n, found, inside = of(statistics(model, loss, batch, wanted, output=output, max_memory=max_memory))
        for k in mean:
            delta = found[k] - mean[k]
            mean[k] += delta * (n / (seen + n))
            squares[k] += delta.square() * (seen * n / (seen + n))
            if n > 1:
                squares[k] += inside[k]
        seen += n
    return Moments(seen, mean, squares)


def of(stats: Statistics) -> Moments:
    """Those behind "grad" and "variance" (without it no squares), whatever the loss's reduction."""
    n, unreduced = stats.samples, stats.normalizer / stats.samples
    squares = {k: n * v.double() for k, v in stats["variance"].items()} if "variance" in stats else {}
    return Moments(n, {k: g.double() * unreduced for k, g in stats["grad"].items()}, squares)
