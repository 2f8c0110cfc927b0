"""Polar factors of matrices: their singular vectors with every singular value one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError

LEAST = 1e-7  # of the largest squared singular value: those below it grow less
SMALL = 1e-25  # of a largest squared singular value that float32 carries well
EMPTY = 1e-30  # of all of them where X is 0
STACKED = 2**14  # entries, up to which matrices of one shape are copied into one


def polar_factors(matrices: Sequence[Tensor], least: float = LEAST) -> list[Tensor]:
    """(X X^T + least ||X||_2^2 I)^-1/2 X of each real X [p, q]: U V^T for X = U S V^T, but for singular values below
    sqrt(least) times the largest, which end below one; 0 where X is.

    By the eigenvectors of the products of the shorter side, in X's precision; in float64 where they do not converge.
    """
    kinds: dict[tuple[int, int], list[int]] = {}
    for i, X in enumerate(matrices):
        shape = (min(X.shape), max(X.shape))
        kinds.setdefault(shape if X.numel() <= STACKED else (i, 0), []).append(i)
    found: list[Tensor] = list(matrices)
    for places in kinds.values():
        wide = [matrices[i].shape[0] <= matrices[i].shape[1] for i in places]
        each = [matrices[i] if w else matrices[i].T for i, w in zip(places, wide, strict=True)]
        factors = (_wide(each[0], least),) if len(each) == 1 else _wide(torch.stack(each), least).unbind()
        for i, w, D in zip(places, wide, factors, strict=True):
            found[i] = D if w else D.T
    return found


def _wide(X: Tensor, least: float) -> Tensor:
    """[..., p, q] with p <= q."""
    if (found := _eigh(X @ X.mT)) is None:
        X = _scaled(X)
        gram = (X @ X.mT).double()
        values, vectors = (t.to(X.dtype) for t in torch.linalg.eigh(gram))
    else:
        values, vectors = found
    values = values.clamp_(min=0)
    largest = values[..., -1:]
    weights = values.add(largest, alpha=least).clamp_(min=EMPTY).rsqrt_()
    return ((vectors * weights.unsqueeze(-2)) @ vectors.mT) @ X


def _eigh(gram: Tensor) -> tuple[Tensor, Tensor] | None:
    """None where squares vanished or overflowed, and where LAPACK failed: in float32 its eigenvalues of a matrix of low
    rank may be NaN, without an error."""
    try:
        values, vectors = torch.linalg.eigh(gram)
    except LinAlgError:
        return None
    safe = values[..., -1].amin() > SMALL
    return (values, vectors) if bool(safe) and float(values.sum()) < 1 / SMALL else None


def _scaled(X: Tensor) -> Tensor:
    """With largest entries of one."""
    size = X.abs().amax((-2, -1), keepdim=True)
    return X / torch.where(size > 0, size, 1.0)
