"""How good a reconstruction and its uncertainty are, against the true image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from paraboloid.tomography.projector import Projector

RANK, SEEN = 100, 1e-6  # of the published protocol's pseudo-inverse: its rank, and singular values that count as 0
INSIDE = {"50": 0.6744897501960817, "90": 1.6448536269514722}  # standard deviations on each side of an interval


def psnr(x: Tensor, truth: Tensor) -> float:
    """10 log10(range^2 / mean squared error), in dB."""
    spread = truth.max() - truth.min()
    return float(10 * torch.log10(spread.square() / (x - truth).square().mean()))


def density(error: Tensor, std: Tensor, floor: float) -> float:
    """Mean log density per pixel of independent Gaussians, floor added to the standard deviation's square."""
    variance = std.double().square() + floor
    return float(-(variance.log() + error.double().square() / variance + math.log(2 * math.pi)).mean() / 2)


def of(mean: Tensor, std: Tensor, truth: Tensor, floor: float) -> dict[str, Any]:
    """PSNR, log density, coverage of central intervals, and correlation of error and standard deviation."""
    error, wide = (truth - mean).abs(), (std.square() + floor).sqrt()
    pair = torch.stack([error.flatten(), std.flatten()]).double()
    correlation = float(torch.corrcoef(pair)[0, 1]) if bool((pair.std(1) > 0).all()) else 0.0
    inside = {name: float((error <= z * wide).double().mean()) for name, z in INSIDE.items()}
    mse, spread = float(error.square().mean()), float(std.square().mean().sqrt())
    return {"psnr": psnr(mean, truth), "density": density(error, std, floor), "inside": inside,
            "correlation": correlation, "mse": mse, "std": spread}  # fmt: skip


def carried(A: Projector, noise_variance: float) -> float:
    """The one variance of the published protocol: noise_variance times the mean diagonal of (A^T A)^+ of rank 100."""
    matrix: Any = A.to_scipy()
    rank = min(RANK, min(matrix.shape) - 1)
    options: dict[str, Any] = {"tol": 1e-4, "v0": np.ones(min(matrix.shape)), "return_singular_vectors": False}
    values: Any = svds(matrix, k=rank, **options)
    seen = values[values > SEEN * values.max()]
    return noise_variance * float((seen**-2.0).sum()) / matrix.shape[1]


def isotropic(mse: float, others: Sequence[float]) -> float:
    """Log density per pixel of one variance for all pixels: the mean squared error of the other images.

    Without others it is the image's own, the best that one variance can be.
    """
    variance = sum(others) / len(others) if others else mse
    return -(math.log(2 * math.pi * variance) + mse / variance) / 2
