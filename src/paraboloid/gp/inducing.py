"""Gaussian processes through a few inducing inputs: N M^2 operations, M numbers to keep."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from paraboloid.gp.definite import check_definite
from paraboloid.gp.gram import Gram
from paraboloid.gp.inputs import inputs_of
from paraboloid.gp.kernel import Kernel
from paraboloid.gp.solvers import Solved, quadratic
from paraboloid.linalg.column_nystrom import pivoted_columns
from paraboloid.linalg.operand import LinAlgError, check_count
from paraboloid.linalg.probes import generator_of
from paraboloid.linalg.solution import Solution

ROWS = 2048  # rows of k(x, Z) that are formed at a time


def solve_inducing(
    kernel: Kernel, x: Tensor, b: Tensor, noise: Tensor, inducing: Any, seed: int
) -> tuple[Gram, Solved]:
    """Weights a = (noise K_ZZ + K_ZX K_XZ)^-1 K_ZX b at inducing inputs Z, for columns b [N, S]; f(x) = k(x, Z) a.

    It is the minimum of |b - K_XZ a|^2 + noise a.K_ZZ a, the posterior mean for functions in the span of k(., Z).
    inducing  a number M: inputs of the data by pivoted columns of K; or the inputs Z [M, d]
    Explained variance: k_Z.(K_ZZ^-1 - (K_ZZ + K_ZX K_XZ / noise)^-1) k_Z.  Sources: Titsias 2009; Lin et al. 2023,
    arXiv:2306.11589, section 3.3.
    """
    everything = Gram(kernel, x, torch.zeros_like(noise.sum()))
    check_definite(everything, noise, generator_of(seed, x.device))
    if isinstance(inducing, int):
        check_count("inducing", inducing, most=len(x))
        Z = x[pivoted_columns(everything, everything.diagonal, inducing, seed=seed).pivots]
        reason = f"{len(Z)} inducing inputs, from the data by pivoted columns"
    else:
        Z, reason = inputs_of(inducing, x, "inducing"), "inducing inputs as given"
    if not bool((noise > 0).all()):
        raise ValueError(f"noise_variance is {float(noise.min())}; expected a positive one with inducing inputs.")
    gram = Gram(kernel, Z, x.new_zeros(()), shift=x.mean(0))
    jitter = 1e-10 if x.dtype == torch.float64 else 1e-6
    KZZ = gram.dense().double()
    KZZ.diagonal().add_(jitter * gram.diagonal.double())
    L = _factor(KZZ, "K_ZZ")
    # With V = L^-1 K_ZX / noise^1/2, B = I + V V^T is as well conditioned as the problem allows.
    B, c = torch.eye(len(Z), dtype=torch.float64, device=x.device), b.new_zeros(len(Z), b.shape[1]).double()
    weights = noise.expand(len(x)).rsqrt()
    for i in range(0, len(x), ROWS):
        here = slice(i, i + ROWS)
        V = torch.linalg.solve_triangular(L, gram.cross_matrix(x[here]).T.double(), upper=False) * weights[here]
        B += V @ V.T
        c += V @ (weights[here].unsqueeze(1) * b[here]).double()
    LB = _factor(B, "I + V V^T")
    a = torch.linalg.solve_triangular(L.T, torch.cholesky_solve(c, LB), upper=True).to(x)
    return gram, Solved("inducing", reason, Solution(a, 0.0, 1, len(Z) / len(x)), None, partial(_explained, L, LB))


def _explained(L: Tensor, LB: Tensor, k: Tensor) -> Tensor:
    inner = torch.linalg.solve_triangular(L, k.T.double(), upper=False)
    return (inner.square().sum(0) - quadratic(LB, inner.T)).to(k)


def _factor(A: Tensor, name: str) -> Tensor:
    L, failed = torch.linalg.cholesky_ex(A)
    if failed:
        raise LinAlgError(f"{name} of the inducing inputs has no positive pivot at column {int(failed)} of {len(A)}; "
                          "expected independent ones: take fewer of them.")  # fmt: skip
    return L
