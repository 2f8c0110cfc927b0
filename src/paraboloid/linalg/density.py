"""The spectral density of an operator by stochastic Lanczos quadrature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.eigen import eigh, eigsh
from paraboloid.linalg.krylov import lanczos
from paraboloid.linalg.operand import Operand, check_count
from paraboloid.linalg.probes import Seed, generator_of


def spectral_density(
    A: Any,
    samples: int = 10,
    seed: Seed = 0,
    *,
    steps: int = 80,
    points: int = 1024,
    width: float | None = None,
    log: bool = False,
    floor: float = 1e-8,
    deflate: int = 0,
) -> tuple[Tensor, Tensor]:
    """(grid, density), both [points]: the density of the D eigenvalues, integrating to 1 over the grid.

    Each of `samples` random start vectors gives `steps` Lanczos products and with them a quadrature rule for the
    spectrum; the nodes of all rules are smoothed by a Gaussian.  Its standard deviation `width` is a fraction of the
    range on the axis, 1/100 by default: structure finer than that is not resolved.

    log=False: `grid` is even in the eigenvalue, and ``torch.trapezoid(density, grid) == 1``.
    log=True: `grid` is even in log10 of the eigenvalue, from `floor` times the largest one up, `density` is per decade,
    and ``torch.trapezoid(density, grid.log10()) == 1``; eigenvalues below the floor, negative ones too, count as the
    floor.

    deflate: so many of the largest eigenvalues are found one by one (`eigsh`) and stand where they are, each with the
    weight 1 / D; the samples see what is left, so that a few outliers neither blur nor waste steps.
    Source: Ghorbani, Krishnan and Xiao 2019, arXiv:1901.10159; deflation: Papyan 2018, arXiv:1811.07062.
    """
    A = Operand(A)
    check_count("samples", samples)
    check_count("steps", steps)
    check_count("points", points, least=10)
    if width is not None and not 0 < width < 1:
        raise ValueError(f"width is {width}; expected a fraction of the grid's range, between 0 and 1.")
    if log and not 0 < floor < 1:
        raise ValueError(f"floor is {floor}; expected a fraction of the largest eigenvalue, between 0 and 1.")
    generator = generator_of(seed, A.device)
    if deflate:
        check_count("deflate", deflate, most=A.size - 1)
        top, vectors = eigsh(A, deflate, seed=generator)
        left = A.size - deflate
        nodes, weights = quadrature(A, samples, min(steps, left), generator, vectors.T.contiguous())
        nodes = torch.cat([nodes, top.to(nodes)])
        weights = torch.cat([weights * (left / A.size), weights.new_full((deflate,), 1 / A.size)])
    else:
        nodes, weights = quadrature(A, samples, min(steps, A.size), generator)
    if log:
        if not nodes.max() > 0:
            raise ValueError(f"the largest eigenvalue is {nodes.max():.4g}; expected a positive one for log=True.")
        nodes = nodes.clamp(min=floor * nodes.max()).log10()
    low, high = nodes.min(), nodes.max()
    span = high - low if high > low else (high.abs() if high != 0 else torch.ones_like(high))
    sigma = (0.01 if width is None else width) * span
    axis = low - 4 * sigma + (span + 8 * sigma) * torch.linspace(0, 1, points, dtype=nodes.dtype, device=nodes.device)
    density = torch.exp(-0.5 * ((axis[:, None] - nodes) / sigma).square()) @ weights
    density = density / torch.trapezoid(density, axis)
    return (10**axis if log else axis).to(A.dtype), density.to(A.dtype)


def quadrature(
    A: Operand, samples: int, steps: int, generator: torch.Generator, beside: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Nodes [samples * steps] and weights, summing to 1, of the averaged Lanczos quadrature; in float64.

    beside: orthonormal rows [m, D], eigenvectors that are left out.
    """
    nodes, weights = [], []
    for _ in range(samples):
        T, _ = lanczos(A, steps, generator, beside)
        values, vectors = eigh(T.double())
        nodes.append(values)
        weights.append(vectors[0].square() / samples)
    return torch.cat(nodes), torch.cat(weights)
