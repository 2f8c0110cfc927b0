"""The phantom from few angles and from many noisy ones: what is reconstructed, how far off it is, how sure it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paraboloid import tomography
from paraboloid.jobs.studies.tomography import scores
from paraboloid.jobs.studies.tomography.cells import DROPOUT, FLOOR, observed
from paraboloid.jobs.studies.tomography.plan import Plan
from paraboloid.tomography.image_jacobian import ImageJacobian
from paraboloid.tomography.sampled_evidence import SampledEvidence
from paraboloid.tomography.side_by_side import deep_image_priors

CASES = ("few angles", "noisy")
STEPS = 12  # of the evidence's ascent


def case(truth: Tensor, name: str, angles: int, level: float, plan: Plan, seed: int) -> dict[str, Any]:
    """One case, with its maps as nested lists."""
    rival = dropout(truth, angles, level, plan, seed)
    return {"case": name, **reconstructed(truth, angles, level, plan, seed), "dropout": rival}


def reconstructed(
    truth: Tensor, angles: int, level: float, plan: Plan, seed: int, checkpoint: Path | None = None
) -> dict[str, Any]:
    """The linearised posterior's scores and maps, and those of the network and total variation."""
    A = tomography.ParallelBeam(truth.shape[-1], angles)
    y, s2 = observed(A, truth, level, seed)
    fit = tomography.deep_image_prior(A, y, s2, seed, iterations=plan.iterations, checkpoint=checkpoint)
    posterior = tomography.linearised(fit, samples=plan.samples, seed=seed, steps=STEPS)
    mean, std = posterior.mean, posterior.std
    found = scores.of(mean, std, truth, (FLOOR * float(truth.max())) ** 2)
    found["patches 4"] = posterior.log_likelihood(truth, patch=4)
    best = float((truth - mean).square().mean())
    maps = {"true": truth, "mean": mean, "error": (truth - mean).abs(), "std": std}
    return {
        "angles": angles, "noise": level, "size": truth.shape[-1], "exact": posterior.exact, "stopped": fit.stopped,
        "noise_variance": posterior.noise_variance, "true_noise_variance": s2, "posterior": found,
        "isotropic": scores.isotropic(best, []), "carried": scores.isotropic(best, [scores.carried(A, s2)]),
        "network": scores.psnr(fit.image, truth),
        "tv": scores.psnr(tomography.total_variation(A, y, noise_variance=s2), truth),
        "maps": {key: _numbers(value) for key, value in maps.items()},
    }  # fmt: skip


def dropout(truth: Tensor, angles: int, level: float, plan: Plan, seed: int) -> dict[str, Any]:
    """Monte Carlo dropout's scores."""
    A = tomography.ParallelBeam(truth.shape[-1], angles)
    y, s2 = observed(A, truth, level, seed)
    rival = deep_image_priors([A], [y], [s2], [seed], iterations=plan.iterations, stop=False, dropout=DROPOUT)
    (x,) = rival.masked(plan.samples, seed)
    return scores.of(x.mean(0), x.std(0), truth, (FLOOR * float(truth.max())) ** 2)


def agreement(truth: Tensor, angles: int, level: float, plan: Plan, seed: int) -> dict[str, Any]:
    """The evidence formed exactly and by products alone, at one prior; and the standard deviations of both."""
    A = tomography.ParallelBeam(truth.shape[-1], angles)
    y, s2 = observed(A, truth, level, seed)
    fit = tomography.deep_image_prior(A, y, s2, seed, iterations=plan.iterations)
    exact = tomography.linearised(fit, samples=plan.samples, seed=seed, evidence="exact")
    J = ImageJacobian(fit, exact.prior.names, dtype=torch.float64)
    residual = exact.evidence.residual.view_as(y)
    sampled = tomography.ImagePosterior(
        fit, J, SampledEvidence(J, A, residual), exact.prior, exact.noise_variance, plan.samples,
        seed, "damped",
    )  # fmt: skip
    value = sampled.evidence.value(exact.prior, exact.noise_variance, plan.probes)
    return {
        "angles": angles, "exact": exact.log_evidence(), "sampled": float(value), "error": value.standard_error,
        "std": float(sampled.std.mean() / exact.std.mean()), "mean": float((sampled.mean - exact.mean).abs().max()),
    }  # fmt: skip


def _numbers(image: Tensor) -> list[list[float]]:
    return [[round(v, 4) for v in row] for row in torch.as_tensor(image).double().tolist()]
