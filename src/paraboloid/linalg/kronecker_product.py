"""The algebra of one Kronecker-factored block, left (x) right, whatever its factors are kept as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from paraboloid.linalg.eigenform import Basis, Eigenform, decomposed, matmul
from paraboloid.passes.modes import precisely


@dataclass(frozen=True, eq=False)
class Side:
    """One symmetric positive semi-definite factor for each of G groups.

    kind "matrix": data [G, p, p].  "diagonal": [G, p].  "rows": [G, R, p], the factor being rows^T rows; with R < p
    it has at most R eigenvalues other than zero, which the [R, R] matrix of the rows' inner products has too.
    """

    kind: Literal["matrix", "diagonal", "rows"]
    data: Tensor

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def size(self) -> int:
        return self.data.shape[-1]

    def equals(self, other: Side) -> bool:
        same = self.kind == other.kind and self.data.dtype == other.data.dtype
        return same and self.data.shape == other.data.shape and torch.equal(self.data, other.data)

    @precisely
    def times(self, x: Tensor) -> Tensor:
        """The factor times x [.. G p k]."""
        if self.kind == "diagonal":
            return self.data.unsqueeze(-1) * x
        data = self.data[0] if len(self.data) == 1 else self.data
        return data @ x if self.kind == "matrix" else data.mT @ (data @ x)

    @precisely
    def dense(self) -> Tensor:
        """[G, p, p]."""
        if self.kind == "matrix":
            return self.data
        return self.data.diag_embed() if self.kind == "diagonal" else self.data.mT @ self.data

    def diagonal(self) -> Tensor:
        """[G, p]."""
        if self.kind == "diagonal":
            return self.data
        return self.data.diagonal(dim1=1, dim2=2) if self.kind == "matrix" else self.data.square().sum(1)

    def trace(self) -> Tensor:
        """[G]."""
        return self.diagonal().sum(1)

    @precisely
    def norm(self) -> Tensor:
        """Frobenius norm, [G]."""
        data = self.data @ self.data.mT if self.kind == "rows" else self.data
        return data.flatten(1).norm(dim=1)

    @precisely
    def basis(self, what: str) -> tuple[Basis, Tensor]:
        """Eigenvectors and eigenvalues [G, r]; r < p for few rows.  What is negative by rounding becomes zero."""
        if self.kind == "diagonal":
            return Basis(None, self.size), self.data
        if self.size == 1:
            return Basis(None, 1), self.dense()[..., 0]
        if self.kind == "rows" and self.data.shape[1] < self.size:
            Q, R = torch.linalg.qr(self.data.mT)  # rows = R^T Q^T: an exactly orthonormal basis, whatever the rank
            values, vectors = decomposed(R @ R.mT, what)
            return Basis(Q @ vectors, self.size), values.clamp(min=0)
        values, vectors = decomposed(self.dense(), what)
        rounding = torch.finfo(values.dtype).eps * self.size * values.abs().amax(1, keepdim=True)
        return Basis(vectors, self.size), values.where((values > 0) | (values < -rounding), 0)


@dataclass(frozen=True, eq=False)
class KroneckerProduct:
    """left (x) right for each group; the block-diagonal matrix of the groups, D = G p q."""

    left: Side
    right: Side

    @property
    def groups(self) -> int:
        return len(self.left.data)

    @property
    def device(self) -> torch.device:
        return self.left.data.device

    @property
    def size(self) -> int:
        return self.groups * self.left.size * self.right.size

    def to(self, dtype: torch.dtype) -> KroneckerProduct:
        return KroneckerProduct(*(Side(side.kind, side.data.to(dtype)) for side in (self.left, self.right)))

    def product(self, rows: Tensor) -> Tensor:
        """Products with the K rows of a [K, D] tensor, as rows."""
        V = rows.reshape(-1, self.groups, self.left.size, self.right.size)
        return self.right.times(self.left.times(V).mT).mT.reshape(rows.shape)

    def __matmul__(self, v: Tensor) -> Tensor:
        return matmul(self.product, self.size, v)

    @precisely
    def to_dense(self) -> Tensor:
        left, right = self.left.dense().contiguous(), self.right.dense().contiguous()
        return torch.block_diag(*(torch.kron(a, b) for a, b in zip(left, right, strict=True)))

    def diagonal(self) -> Tensor:
        return (self.left.diagonal().unsqueeze(2) * self.right.diagonal().unsqueeze(1)).reshape(-1)

    def trace(self) -> Tensor:
        return (self.left.trace() * self.right.trace()).sum()

    def frobenius_norm(self) -> Tensor:
        return (self.left.norm() * self.right.norm()).norm()

    def eigenform(self, name: str = "the block", known: list[Decomposed] | None = None) -> Eigenform:
        """Its eigenvalues, products of the factors', and eigenvectors; `name` is the parameter's, for errors.

        `known` collects decompositions: a factor that equals an earlier one (a layer's weight and bias have the same
        gradient factor, if used at one position) takes that one's.
        """
        known = [] if known is None else known
        left, left_values = _decomposed_once(self.left, f"{name}: the left factor", known)
        right, right_values = _decomposed_once(self.right, f"{name}: the right factor", known)
        values = left_values.unsqueeze(2) * right_values.unsqueeze(1)
        return Eigenform(left, right, values, values.new_zeros(()))

    @precisely
    def split_inverse(self, damping: float, name: str = "the block") -> KroneckerProduct:
        """(left + pi sqrt(damping) I)^-1 (x) (right + sqrt(damping) / pi I)^-1, an approximation of the damped inverse.

        pi^2 is the mean eigenvalue of left over that of right.  Needs no eigendecomposition, only two inverses.
        Source: Martens & Grosse 2015, arXiv:1503.05671, section 6.3.
        """
        if not damping >= 0:
            raise ValueError(f"damping is {damping}; expected a number of at least 0 to split between the factors.")
        means = [side.trace() / side.size for side in (self.left, self.right)]
        pi = (means[0] / means[1]).sqrt()
        pi = pi.where(torch.isfinite(pi) & (pi > 0), 1.0)
        sides = [
            _inverse(side, shift, f"{name}: the {which} factor")
            for side, shift, which in (
                (self.left, pi * damping**0.5, "left"), (self.right, damping**0.5 / pi, "right")
            )
        ]  # fmt: skip
        return KroneckerProduct(*sides)


Decomposed = tuple[Side, Basis, Tensor]


def _decomposed_once(side: Side, what: str, known: list[Decomposed]) -> tuple[Basis, Tensor]:
    for other, basis, values in known:
        if side.equals(other):
            return basis, values
    known.append((side, *side.basis(what)))
    return known[-1][1:]


def _inverse(side: Side, shift: Tensor, what: str) -> Side:
    """(factor + shift I)^-1; shift [G]."""
    if side.kind == "diagonal":
        shifted = side.data + shift.unsqueeze(1)
        if not (shifted > torch.finfo(shifted.dtype).eps * shifted.max()).all():
            raise ValueError(f"{what} plus its share of the damping has the smallest entry {shifted.min():.4g} and the "
                             f"largest {shifted.max():.4g}; expected positive numbers. Increase damping.")  # fmt: skip
        return Side("diagonal", 1 / shifted)
    shifted = side.dense().clone()
    shifted.diagonal(dim1=1, dim2=2).add_(shift.unsqueeze(1))
    scale = shifted.diagonal(dim1=1, dim2=2).amax(1)
    L, info = torch.linalg.cholesky_ex(shifted)
    smallest = L.diagonal(dim1=1, dim2=2).square().amin(1)
    if (info != 0).any() or not (smallest > torch.finfo(shifted.dtype).eps * scale).all():
        raise ValueError(f"{what}, {list(shifted.shape[1:])}, plus its share {shift.tolist()} of the damping is "
                         "singular; expected a positive definite matrix. Increase damping.")  # fmt: skip
    return Side("matrix", torch.cholesky_inverse(L))
