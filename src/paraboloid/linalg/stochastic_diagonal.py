"""Stochastic estimates of an operator's diagonal from products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.eigen import dense
from paraboloid.linalg.estimate import TensorEstimate, mean_tensor_estimate
from paraboloid.linalg.operand import Operand, check_count, transposed
from paraboloid.linalg.probes import Seed, blocks, drawn, generator_of, signs
from paraboloid.linalg.trace import left_out


def diagonal(A: Any, samples: int = 64, seed: Seed = 0, *, probes: str = "signs") -> TensorEstimate:
    """Mean of v * (A v) over `samples` random vectors v, [D]: one product each, unbiased.

    The result is a tensor with `.standard_error` [D]; entry i has the variance sum_{j != i} A_ij^2 / samples, and
    2 A_ii^2 / samples more for probes="normal" in the place of "signs".
    Source: Bekas, Kokiopoulou and Saad 2007.
    """
    A = Operand(A)
    check_count("samples", samples)
    generator = generator_of(seed, A.device)
    total = torch.zeros(A.size, dtype=A.dtype, device=A.device)
    squares = torch.zeros_like(total)
    for count in blocks(samples, A.size, A.dtype):
        V = drawn(probes, (A.size, count), A, generator)
        draws = V * (A @ V)
        total += draws.sum(1)
        squares += draws.square().sum(1)
    return mean_tensor_estimate(total, squares, samples)


def xdiag(A: Any, samples: int = 64, seed: Seed = 0) -> TensorEstimate:
    """The exchangeable estimate of a diagonal, [D]: every test vector serves the sketch and, left out, the estimate.

    With q = samples // 2 random sign vectors W and Q_i a basis of A W without its column i, the mean over i of

        diag(Q_i Q_i^T A) + w_i * (I - Q_i Q_i^T) A w_i,

    each unbiased.  2 q products, and 2 q vectors in memory; far more accurate than `diagonal` where the spectrum
    decays, exact for samples >= 2 D.  The standard error is that of the q terms, taken as independent.
    Of a matrix that is not symmetric, Q^T A comes from products with its transpose, `A.T`; ValueError where it has
    none.  Source: Epperly, Tropp and Webber 2024, arXiv:2301.07825, section 4.
    """
    A = Operand(A)
    check_count("samples", samples, least=4)
    q = samples // 2
    if q >= A.size:
        exact = dense(A).diagonal()
        return mean_tensor_estimate(2 * exact, 2 * exact.square(), 2)
    W = signs((A.size, q), A, generator_of(seed, A.device))
    Y = A @ W
    Q, R = torch.linalg.qr(Y)
    Z = (A if _is_symmetric(W, Y) else transposed(A, "xdiag")) @ Q  # (Q^T A)^T
    S = left_out(R, A.size)
    # What is left of A w_i = Q r_i outside the span of Q_i lies along Q s_i.
    along = Q @ S
    draws = (Q * Z).sum(1, keepdim=True) + along * (W * (S * R).sum(0) - Z @ S)
    return mean_tensor_estimate(draws.sum(1), draws.square().sum(1), q)


def _is_symmetric(W: Tensor, Y: Tensor) -> bool:
    """Whether the forms W^T A W, [q, q], are, but for rounding: tells for Y = A W, almost surely, whether A is."""
    forms = W.T @ Y
    rounding = 10 * torch.finfo(Y.dtype).eps ** 0.75 * len(W) ** 0.5 * Y.norm()
    return bool((forms - forms.T).norm() <= rounding)
