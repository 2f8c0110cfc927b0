"""Total variation: the length of an image's edges, and the reconstruction that keeps it small."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import check_count
from paraboloid.tomography.measurement import as_projector
from paraboloid.tomography.projector import Projector
from paraboloid.tomography.sinograms import as_sinogram, check_noise_variance, noise_variance_of

SHARE = 3.0  # weight over noise variance, for images between 0 and 1
POWER_STEPS = 30


def variation(x: Tensor) -> Tensor:
    """sum of |x_{i+1,j} - x_{i,j}| + |x_{i,j+1} - x_{i,j}| over images [..., H, W], 0-dimensional."""
    return x.diff(dim=-2).abs().sum() + x.diff(dim=-1).abs().sum()


@torch.no_grad()
def total_variation(
    A: Any, y: Any, weight: float | None = None, noise_variance: float | None = None, iterations: int = 300
) -> Tensor:
    """argmin over images x >= 0 of ||A x - y||^2 / 2 + weight TV(x), [..., H, W], with TV as `variation` has it.

    y        the sinogram, [angles, detectors] or a stack of them, each reconstructed by itself
    weight   by default 3 noise_variance / the image's scale, which suits images of few edges; see `noise_variance_of`
             for the variance where it is not given

    Solved by the primal-dual iteration of Chambolle and Pock (2011), algorithm 1.  Raises ValueError for a sinogram
    that does not fit A or is not finite, and a weight below zero.
    """
    y = as_sinogram(y)
    A = as_projector(A, y)
    iterations = check_count("iterations", iterations)
    check_noise_variance(noise_variance)
    if weight is None:
        weight = SHARE * (noise_variance_of(y) if noise_variance is None else float(noise_variance)) / scale_of(A, y)
    if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= weight < math.inf:
        raise ValueError(f"weight is {weight!r}; expected a number of at least 0.")
    step = 0.99 / math.sqrt(squared_norm(A, y) + 8)  # 8: of the differences
    lead = y.shape[: y.dim() - len(A.gives)]
    x = y.new_zeros(*lead, *A.takes)
    ahead, dual, edges = x, torch.zeros_like(y), [x.diff(dim=d) for d in (-2, -1)]
    for _ in range(iterations):
        dual = (dual + step * (A @ ahead - y)) / (1 + step)
        edges = [(e + step * ahead.diff(dim=d)).clamp(-weight, weight) for e, d in zip(edges, (-2, -1), strict=True)]
        moved = (x - step * (A.T @ dual + _adjoint(edges[0], -2) + _adjoint(edges[1], -1))).clamp(min=0)
        ahead, x = 2 * moved - x, moved
    return x


def _adjoint(e: Tensor, dim: int) -> Tensor:
    """Of the differences along an axis."""
    zero = torch.zeros_like(e.sum(dim, keepdim=True))
    return -torch.cat([e, zero], dim).diff(dim=dim, prepend=zero)


def squared_norm(A: Projector, y: Tensor) -> float:
    """The largest eigenvalue of A^T A, from below, by power iteration."""
    v = torch.ones(A.takes, dtype=y.dtype, device=y.device)
    value = 0.0
    for _ in range(POWER_STEPS):
        v = A.T @ (A @ v)
        value = float(v.norm())
        if not value > 0:
            raise ValueError("A maps images to 0; expected a projector whose rays meet the image.")
        v = v / value
    return value


def scale_of(A: Projector, y: Tensor, steps: int = 10) -> float:
    """About the largest value of the image: the 99th percentile of a few steps of least squares (Landweber's)."""
    step = 1 / squared_norm(A, y)
    x = step * (A.T @ y)
    for _ in range(steps):
        x = (x - step * (A.T @ (A @ x - y))).clamp(min=0)
    flat = x.flatten()
    return max(float(flat.kthvalue(max(1, math.ceil(0.99 * len(flat)))).values), torch.finfo(x.dtype).tiny)
