"""The log determinant of a positive definite operator, from products."""

from __future__ import annotations

from typing import Any

import torch

from paraboloid.linalg.estimate import Estimate, mean_estimate
from paraboloid.linalg.krylov import lanczos
from paraboloid.linalg.operand import LinAlgError, Operand, check_count
from paraboloid.linalg.probes import Seed, generator_of


def logdet(A: Any, samples: int = 16, steps: int = 32, seed: Seed = 0) -> Estimate:
    """log det A = tr log A by stochastic Lanczos quadrature, with its standard error.

    For `samples` random unit vectors q, D q.log(A) q with log(A) as `steps` of Lanczos from q see it: samples * steps
    products.  Raises `torch.linalg.LinAlgError` for an A that is seen not to be positive definite.  Source: Ubaru, Chen
    and Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature".
    """
    A = Operand(A)
    check_count("samples", samples)
    steps = check_count("steps", min(int(steps), A.size))
    generator, draws = generator_of(seed, A.device), []
    for _ in range(samples):
        T, _ = lanczos(A, steps, generator)
        values, vectors = torch.linalg.eigh(T)
        if not values[0] > 0:
            raise LinAlgError(f"A has the Ritz value {values[0].item():.4g}; expected a positive definite operator.")
        draws.append((vectors[0].square() * values.log()).sum() * A.size)
    return mean_estimate(torch.stack(draws))
