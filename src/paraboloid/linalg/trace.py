"""Stochastic estimates of a trace from products; each says how far off it may be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.eigen import dense
from paraboloid.linalg.estimate import Estimate, mean_estimate
from paraboloid.linalg.operand import Operand, check_count
from paraboloid.linalg.probes import Seed, blocks, drawn, generator_of, normal, signs


def hutchinson_trace(A: Any, samples: int = 64, seed: Seed = 0, *, probes: str = "signs") -> Estimate:
    """Mean of v.A v over `samples` random vectors v: one product each, unbiased.

    probes: "signs" (+1 and -1), whose variance 2 sum_{i != j} A_ij^2 is the smallest, or "normal", 2 |A|_F^2.
    Source: Hutchinson 1989.
    """
    A = Operand(A)
    check_count("samples", samples)
    return mean_estimate(_forms(A, samples, generator_of(seed, A.device), probes=probes))


def squared_frobenius(A: Any, samples: int = 64, seed: Seed = 0, *, probes: str = "signs") -> Estimate:
    """Mean of |A v|^2 over `samples` random vectors v (see `hutchinson_trace`): the sum of A's squared entries.

    One product each, unbiased, for any matrix; for a symmetric one it is the sum of squared eigenvalues.
    """
    A = Operand(A)
    check_count("samples", samples)
    generator, found = generator_of(seed, A.device), []
    for count in blocks(samples, A.size, A.dtype):
        found.append((A @ drawn(probes, (A.size, count), A, generator)).square().sum(0))
    return mean_estimate(torch.cat(found))


def hutchpp_trace(A: Any, samples: int = 63, seed: Seed = 0) -> Estimate:
    """tr(Q^T A Q) exactly, plus Hutchinson's estimate of the rest, with Q a basis of A S for random signs S.

    A third of the `samples` products each for S, for Q and for the rest; unbiased, and far more accurate where the
    spectrum decays.  The standard error is that of the stochastic part.  With samples >= 3 D the trace is exact.
    Source: Meyer, Musco, Musco and Woodruff 2021, arXiv:2010.09649.
    """
    A = Operand(A)
    check_count("samples", samples, least=3)
    if samples >= 3 * A.size:
        return _exact(A)
    third = samples // 3
    generator = generator_of(seed, A.device)
    Q = torch.linalg.qr(A @ signs((A.size, third), A, generator)).Q
    sketched = (Q * (A @ Q)).sum().item()
    rest = mean_estimate(_forms(A, samples - 2 * third, generator, Q))
    return Estimate(sketched + rest, rest.standard_error)


def xtrace(A: Any, samples: int = 64, seed: Seed = 0) -> Estimate:
    """The exchangeable estimate of a trace: every test vector serves both the sketch and, left out, the estimate.

    With q = samples // 2 test vectors W of length sqrt(D), Q_i a basis of A W without its column i and
    P_i = I - Q_i Q_i^T, the mean over i of

        tr(Q_i^T A Q_i) + c_i w_i.P_i A P_i w_i,   c_i = (D - q + 1) / ||P_i w_i||^2,

    each unbiased.  2 q products; exact for samples >= 2 D.  Source: Epperly, Tropp and Webber 2024, arXiv:2301.07825.
    """
    A = Operand(A)
    check_count("samples", samples, least=4)
    q = samples // 2
    if q >= A.size:
        return _exact(A)
    W = normal((A.size, q), A, generator_of(seed, A.device))
    W = W * (A.size**0.5 / W.norm(dim=0))
    Y = A @ W
    Q, R = torch.linalg.qr(Y)
    Z = A @ Q
    H, C = Q.T @ Z, Q.T @ W
    S = left_out(R, A.size)
    C = C - S * (S * C).sum(0)  # w_i in the basis Q, without s_i
    sketched = H.trace() - (S * (H @ S)).sum(0)
    rest = (W * Y).sum(0) - (C * (Z.T @ W + R)).sum(0) + (C * (H @ C)).sum(0)  # R = Q^T A W, Z^T W its symmetric twin
    length = A.size - C.square().sum(0)
    return mean_estimate(sketched + (A.size - q + 1) / length * rest)


def left_out(R: Tensor, size: int) -> Tensor:
    """Unit columns s_i [q, q]: leaving column i out of Y = Q R, [size, q], takes the direction Q s_i out of the span.

    R^T s_i is along e_i.  If Y has not full rank the other columns span it all the same, and nothing is taken out: 0.
    """
    diagonal = R.diagonal().abs()
    if not diagonal.min() > size * torch.finfo(R.dtype).eps * diagonal.max():
        return torch.zeros_like(R)
    S = torch.linalg.solve_triangular(R.T, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=False)
    return S / S.norm(dim=0)


def _exact(A: Operand) -> Estimate:
    return Estimate(dense(A).trace().item(), 0.0)


def _forms(
    A: Operand, samples: int, generator: torch.Generator, without: Tensor | None = None, probes: str = "signs"
) -> Tensor:  # fmt: skip
    """v.A v for `samples` random vectors, projected to the complement of the columns of `without`."""
    forms = []
    for count in blocks(samples, A.size, A.dtype):
        V = drawn(probes, (A.size, count), A, generator)
        if without is not None:
            V = V - without @ (without.T @ V)
        forms.append((V * (A @ V)).sum(0))
    return torch.cat(forms)
