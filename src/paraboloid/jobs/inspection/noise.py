"""The variance of a mini-batch gradient against the gradient itself, from the gradients of all single samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from paraboloid.data.batches import Batch
from paraboloid.jobs.inspection.subject import Subject
from paraboloid.losses import Loss
from paraboloid.noise.comparison import normalized_variance
from paraboloid.noise.moments import Moments, moments
from paraboloid.noise.noise_scale import Noise, measured


def gradient_noise(subject: Subject, batch_size: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Noise of mean gradients of m = `batch_size` samples, by layer and in total; exact, without weight decay.

    average_variance, normalized_variance  of batches drawn without replacement from the N samples, whose coordinate j
                                           has the variance (1/m - 1/N) 1/(N-1) sum_n (g_nj - g_j)^2: what
                                           `pb.noise.compare` estimates for SG-B
    signal, noise_scale                    those of `pb.noise.measures`
    noise_to_signal                        noise_scale / m; both are None where the signal is not positive
    """
    found = moments(subject.model, Loss.from_torch(subject.problem.loss_fn), _ticked(subject, tick))
    m, noise = min(batch_size, found.samples), measured(found)
    rows = [
        {"name": layer.name, **_summary(noise.layers[layer.name], found, list(layer.parameters), m)}
        for layer in subject.layers
    ]
    return {"layers": rows, "total": _summary(noise.total, found, list(found.mean), m)}


def _ticked(subject: Subject, tick: Callable[[], None]) -> Iterator[Batch]:
    for batch in subject.batches:
        yield batch
        tick()


def _summary(noise: Noise, found: Moments, names: list[str], m: int) -> dict[str, float | None]:
    share = 1 / m - 1 / noise.samples  # takes the variance of single samples to that of their batches
    mean = torch.cat([found.mean[k].flatten() for k in names])
    variance = torch.cat([found.squares[k].flatten() for k in names]) * (share / (noise.samples - 1))
    return {
        "average_variance": share * noise.variance,
        "normalized_variance": normalized_variance(variance, variance + mean.square()),
        "signal": noise.signal,
        "noise_to_signal": None if noise.noise_scale is None else noise.noise_scale / m,
        "noise_scale": noise.noise_scale,
    }
