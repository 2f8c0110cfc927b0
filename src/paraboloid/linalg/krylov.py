"""Lanczos tridiagonalisation with full re-orthogonalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError, Operand, check_count
from paraboloid.linalg.probes import Seed, generator_of, normal


def orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """w minus its components in the orthonormal rows of basis [j, D], taken out twice; and those components [j].

    Twice is enough: Parlett, The symmetric eigenvalue problem, section 6.9.
    """
    if len(basis) == 0:
        return w, w[:0]
    components = basis @ w
    w = w - components @ basis
    again = basis @ w
    return w - again @ basis, components + again


def reorthogonalise_(w: Tensor, basis: Tensor) -> Tensor:
    """`orthogonalise` for a product of a Lanczos process, w = A basis[-1], in place; the components [j].

    Nearly all of w that lies in the basis lies along the last two rows.  With those taken out first, once through the
    whole basis is the second time.  Where it still cancels half (after a restart), another time follows.  In place, for
    a new tensor of a network's size costs more than a pass through it.
    """
    recent = basis[-2:]
    local = recent @ w
    w.addmv_(recent.T, local, alpha=-1)
    before = w.norm()
    components = basis @ w
    w.addmv_(basis.T, components, alpha=-1)
    if not w.norm() > 0.5 * before:
        again = basis @ w
        w.addmv_(basis.T, again, alpha=-1)
        components += again
    components[-2:] += local
    return components


def random_unit(basis: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to the rows of basis [j, D]."""
    size = basis.shape[1]
    for _ in range(5):
        w = normal((size,), basis, generator)
        scale = w.norm()
        w, _ = orthogonalise(w, basis)
        if (norm := w.norm()) > 1e-3 * scale / size**0.5:
            w, _ = orthogonalise(w / norm, basis)
            return w / w.norm()
    raise LinAlgError(f"found no vector orthogonal to {len(basis)} vectors of length {size}.")


def lanczos(A: Any, k: int, seed: Seed = 0, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """k steps of the Lanczos process from a random unit vector: A Q = Q T + a remainder in the last column.

    beside: orthonormal rows [m, D] whose complement it stays in, for eigenvectors that are known already; k <= D - m.

    T [k, k] symmetric tridiagonal, Q [D, k] with orthonormal columns; k <= D.  Where an invariant subspace is exhausted
    the process goes on from a new random vector, and T has a zero beside its diagonal there.
    """
    A = Operand(A)
    none = torch.empty(0, A.size, dtype=A.dtype, device=A.device)
    known = none if beside is None else beside.to(none)
    check_count("k", k, most=A.size - len(known))
    generator = generator_of(seed, A.device)
    Q = torch.empty(k + 1, A.size, dtype=A.dtype, device=A.device)
    T = torch.zeros(k, k, dtype=A.dtype, device=A.device)
    Q[0] = random_unit(known, generator)
    for j in range(k):
        w = Q[j + 1].copy_(orthogonalise(A @ Q[j], known)[0])
        T[j, j] = reorthogonalise_(w, Q[: j + 1])[j]
        if j + 1 == k:
            break
        scale = T[: j + 1, : j + 1].abs().max().item()
        T[j, j + 1] = T[j + 1, j] = normalise_(w, [known, Q[: j + 1]], scale, generator)
    return T, Q[:k].T


def normalise_(w: Tensor, bases: Sequence[Tensor], scale: float, generator: torch.Generator) -> float:
    """The norm of a remainder w orthogonal to the bases, which becomes a unit vector in place; 0, and a random one, if
    w is rounding error."""
    beta = w.norm().item()
    if beta <= 10 * torch.finfo(w.dtype).eps * max(scale, beta) or beta == 0:
        w.copy_(random_unit(torch.cat(list(bases)), generator))
        return 0.0
    w.div_(beta)
    if beta < 1e-3 * scale:  # what is left after cancellation is orthogonal only relative to what was there
        q, _ = orthogonalise(w, torch.cat(list(bases)))
        torch.div(q, q.norm(), out=w)
    return beta
