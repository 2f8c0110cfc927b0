"""One image from sinograms of many angles and noises by every method: what each makes of it, and how sure it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from paraboloid import tomography
from paraboloid.jobs.studies.tomography import scores
from paraboloid.jobs.studies.tomography.plan import Plan
from paraboloid.tomography.reconstruction import Reconstruction
from paraboloid.tomography.side_by_side import deep_image_priors

FLOOR = 1e-3  # standard deviation that every density adds, over the true image's largest value
DROPOUT = 0.05


def observed(A: tomography.Projector, image: Tensor, level: float, seed: int) -> tuple[Tensor, float]:
    """The sinogram with white noise of `level` times its mean absolute value, and the noise's variance."""
    clean = A @ image
    sigma = level * float(clean.abs().mean())
    generator = torch.Generator().manual_seed(seed)
    return clean + sigma * torch.randn(clean.shape, generator=generator, dtype=clean.dtype), sigma**2


def cells_of(truth: Tensor, plan: Plan, seed: int) -> Iterator[dict[str, Any]]:
    """Total variation, the network's image, the linearised posterior and Monte Carlo dropout for each noise and number
    of angles; the networks of all are trained side by side."""
    conditions = [(angles, level) for level in plan.noise for angles in plan.angles]
    A = [tomography.ParallelBeam(truth.shape[-1], angles) for angles, _ in conditions]
    seeds = [seed + angles for angles, _ in conditions]
    y, s2 = zip(*(observed(*of) for of in zip(A, [truth] * len(A), [c[1] for c in conditions], seeds, strict=True)),
                strict=True)  # fmt: skip
    start = time.perf_counter()
    fits = deep_image_priors(A, y, s2, seeds, iterations=plan.iterations).fits
    fitted = time.perf_counter()
    rival = deep_image_priors(A, y, s2, seeds, iterations=plan.iterations, stop=False, dropout=DROPOUT)
    floor = (FLOOR * float(truth.max())) ** 2
    dropped = [scores.of(x.mean(0), x.std(0), truth, floor) for x in rival.masked(plan.samples, seed)]
    for (angles, level), one, fit, dropout in zip(conditions, seeds, fits, dropped, strict=True):
        yield {"angles": angles, "noise": level, "seed": one, "network_seconds": (fitted - start) / len(fits),
               **_posterior(fit, truth, plan, one, floor), "dropout": dropout}  # fmt: skip


def _posterior(fit: Reconstruction, truth: Tensor, plan: Plan, seed: int, floor: float) -> dict[str, Any]:
    start = time.perf_counter()
    posterior = tomography.linearised(fit, samples=plan.samples, seed=seed)
    found = scores.of(posterior.mean, posterior.std, truth, floor)
    for side in (2, 4):
        found[f"patches {side}"] = posterior.log_likelihood(truth, patch=side)
    return {
        "true_noise_variance": fit.noise_variance, "noise_variance": posterior.noise_variance, "stopped": fit.stopped,
        "tv": scores.psnr(fit.input[0, 0], truth), "network": scores.psnr(fit.image, truth), "posterior": found,
        "exact": posterior.exact, "posterior_seconds": time.perf_counter() - start,
    }  # fmt: skip
