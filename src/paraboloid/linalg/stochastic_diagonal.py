"""A stochastic estimate of an operator's diagonal from products."""

from __future__ import annotations

from typing import Any

import torch

from paraboloid.linalg.estimate import TensorEstimate, mean_tensor_estimate
from paraboloid.linalg.operand import Operand, check_count
from paraboloid.linalg.probes import Seed, blocks, generator_of, signs


def diagonal(A: Any, samples: int = 64, seed: Seed = 0) -> TensorEstimate:
    """Mean of v * (A v) over `samples` random sign vectors v, [D]: one product each, unbiased.

    The result is a tensor with `.standard_error` [D]; entry i has the variance sum_{j != i} A_ij^2 / samples.
    Source: Bekas, Kokiopoulou and Saad 2007.
    """
    A = Operand(A)
    check_count("samples", samples)
    generator = generator_of(seed, A.device)
    total = torch.zeros(A.size, dtype=A.dtype, device=A.device)
    squares = torch.zeros_like(total)
    for count in blocks(samples, A.size, A.dtype):
        V = signs((A.size, count), A, generator)
        draws = V * (A @ V)
        total += draws.sum(1)
        squares += draws.square().sum(1)
    return mean_tensor_estimate(total, squares, samples)
