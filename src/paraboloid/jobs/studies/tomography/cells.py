"""One image from one sinogram by every method: what each makes of it, and how sure it is."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from paraboloid import tomography
from paraboloid.jobs.studies.tomography import scores
from paraboloid.jobs.studies.tomography.plan import Plan
from paraboloid.passes.random_state import seeded
from paraboloid.tomography.u_net import UNet

FLOOR = 1e-3  # standard deviation that every density adds, over the true image's largest value
DROPOUT = 0.05


def observed(A: tomography.Projector, image: Tensor, level: float, seed: int) -> tuple[Tensor, float]:
    """The sinogram with white noise of `level` times its mean absolute value, and the noise's variance."""
    clean = A @ image
    sigma = level * float(clean.abs().mean())
    generator = torch.Generator().manual_seed(seed)
    return clean + sigma * torch.randn(clean.shape, generator=generator, dtype=clean.dtype), sigma**2


def cell(truth: Tensor, angles: int, level: float, plan: Plan, seed: int) -> dict[str, Any]:
    """Total variation, the network's image, the linearised posterior and Monte Carlo dropout on one sinogram."""
    A = tomography.ParallelBeam(truth.shape[-1], angles)
    y, s2 = observed(A, truth, level, seed)
    floor, start = (FLOOR * float(truth.max())) ** 2, time.perf_counter()
    fit = tomography.deep_image_prior(A, y, s2, seed, iterations=plan.iterations)
    fitted = time.perf_counter()
    posterior = tomography.linearised(fit, samples=plan.samples, seed=seed)
    found = scores.of(posterior.mean, posterior.std, truth, floor)
    for side in (2, 4):
        found[f"patches {side}"] = posterior.log_likelihood(truth, patch=side)
    done = time.perf_counter()
    return {
        "angles": angles, "noise": level, "seed": seed, "true_noise_variance": s2, "stopped": fit.stopped,
        "noise_variance": posterior.noise_variance, "seconds": {"network": fitted - start, "posterior": done - fitted},
        "tv": scores.psnr(tomography.total_variation(A, y, noise_variance=s2), truth),
        "network": scores.psnr(fit.image, truth), "posterior": found,
        "dropout": _dropout(A, y, s2, truth, floor, plan, seed), "exact": posterior.exact,
    }  # fmt: skip


def _dropout(A: Any, y: Tensor, s2: float, truth: Tensor, floor: float, plan: Plan, seed: int) -> dict[str, Any]:
    """The same network trained with dropout of channels, and its images under as many masks as there are samples."""
    z = tomography.total_variation(A, y, noise_variance=s2).view(1, 1, *truth.shape)
    with seeded(seed):
        model = UNet(1, (), (0.0, 1.2 * float(z.max())), level=float(z.mean()), dropout=DROPOUT)
        fit = tomography.deep_image_prior(
            A, y, s2, iterations=plan.iterations, stop=None, model=model, input=z
        )  # fmt: skip
        with torch.no_grad():
            images = torch.cat([fit.model(z) for _ in range(plan.samples)])
    return scores.of(images.mean(0), images.std(0), truth, floor)
