"""The variance of a mini-batch gradient against the gradient itself, from the gradients of all single samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paraboloid.jobs.inspection.subject import Subject
from paraboloid.losses import Loss
from paraboloid.quantities.door import statistics

# Added to the second moment under the normalised variance, so that a parameter without any gradient counts as 0.
EPSILON = 1e-7


def gradient_noise(subject: Subject, batch_size: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Noise of the mean gradient of `batch_size` samples drawn without replacement, by layer and in total; exact.

    With g the mean of the sample gradients g_n, of the unreduced loss, over all N samples, coordinate j has the
    variance (N - m) / (N - 1) / m * mean_n (g_nj - g_j)^2. Weight decay takes no part.
    """
    mean, variance = moments(subject, tick)
    N, m = subject.size, min(batch_size, subject.size)
    factor = (N - m) / (N - 1) / m if N > 1 else 0.0
    rows = [
        {"name": layer.name, **_summary({k: mean[k] for k in layer.parameters}, variance, factor)}
        for layer in subject.layers
    ]
    total = _summary(mean, variance, factor)
    single, signal = sum(v.sum().item() for v in variance.values()), sum(g.square().sum().item() for g in mean.values())
    return {
        "layers": rows,
        "total": {**total, "noise_scale": N / (N - 1) * single / signal if signal and N > 1 else None},
    }


def moments(subject: Subject, tick: Callable[[], None]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean and variance (1/N) of the sample gradients over all samples, in float64, one tensor for each parameter.

    Batches are merged by the update of Chan, Golub and LeVeque 1979, which does not subtract large numbers.
    """
    loss = Loss.from_torch(subject.problem.loss_fn)
    mean = {k: torch.zeros_like(p, dtype=torch.float64) for k, p in subject.parameters.items()}
    squares = {k: torch.zeros_like(m) for k, m in mean.items()}
    seen = 0
    for batch in subject.batches:
        stats = statistics(subject.model, loss, batch, ["grad", "variance"])
        n = len(stats.output)
        unreduced = loss.normalizer(stats.output, batch[1]) / n  # from the reduced loss to the mean over samples
        for k in mean:
            delta = stats["grad"][k].double() * unreduced - mean[k]
            mean[k] += delta * (n / (seen + n))
            squares[k] += n * stats["variance"][k].double() + delta.square() * (seen * n / (seen + n))
        seen += n
        tick()
    return mean, {k: s / seen for k, s in squares.items()}


def _summary(mean: dict[str, Tensor], variance: dict[str, Tensor], factor: float) -> dict[str, float | None]:
    """Noise and signal over the parameters in `mean`; `factor` takes single samples to mini-batches."""
    size = sum(g.numel() for g in mean.values())
    noise = factor * sum(variance[k].sum().item() for k in mean)
    signal = sum(g.square().sum().item() for g in mean.values())
    normalized = sum(
        (factor * variance[k] / (factor * variance[k] + g.square() + EPSILON)).sum().item() for k, g in mean.items()
    )
    return {
        "average_variance": noise / size,
        "normalized_variance": normalized / size,
        "signal": signal / size,
        "noise_to_signal": noise / signal if signal else None,
    }
