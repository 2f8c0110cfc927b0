"""A symmetric matrix by its eigenvalues in a Kronecker eigenbasis: what can be inverted, rooted and sampled exactly.

A block over D = G p q numbers, for each of G groups (one, but for grouped convolutions),

    sum_{i,j} values[i, j] (u_i (x) w_j) (u_i (x) w_j)^T + rest * (projection on what the u_i (x) w_j leave out)

with orthonormal u_i in R^p and w_j in R^q.  A basis may be thin, with fewer vectors than dimensions, where a factor is
known to have low rank: a function of the matrix acts on `values` and on `rest`, and what is left out is never formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.eigen import eigh
from paraboloid.linalg.operand import LinAlgError, check_damping
from paraboloid.passes.modes import precisely

Pair = tuple[Tensor, Tensor] | None  # a matrix and its transpose
BATCHED = 32  # groups up to this size are decomposed by one call


@dataclass(eq=False)
class Basis:
    """Orthonormal columns, vectors [G, p, r]; None for the r = p unit vectors."""

    vectors: Tensor | None
    size: int  # p

    @property
    def full(self) -> bool:
        return self.vectors is None or self.vectors.shape[2] == self.size

    def equals(self, other: Basis) -> bool:
        if self.vectors is None or other.vectors is None:
            return self.vectors is other.vectors and self.size == other.size
        same = self.vectors.shape == other.vectors.shape
        return self.vectors is other.vectors or (same and torch.equal(self.vectors, other.vectors))

    def to(self, dtype: torch.dtype) -> Basis:
        return Basis(None if self.vectors is None else self.vectors.to(dtype), self.size)

    def rotated(self, x: Tensor) -> Tensor:
        """U^T x: [.. G p k] -> [.. G r k]."""
        return x if self.vectors is None else _first_group(self.vectors.mT, x) @ x

    def restored(self, x: Tensor) -> Tensor:
        """U x: [.. G r k] -> [.. G p k]."""
        return x if self.vectors is None else _first_group(self.vectors, x) @ x

    def squares(self, like: Tensor) -> Tensor:
        """U^2, entry by entry, [G, p, r]."""
        if self.vectors is None:
            return torch.eye(self.size, dtype=like.dtype, device=like.device).expand(len(like), -1, -1)
        return self.vectors.square()

    def overlap(self, other: Basis) -> Tensor | None:
        """(u_i . v_j)^2, [G, r, r]; None where both are the unit vectors."""
        if self.vectors is None or other.vectors is None:
            return None
        return (self.vectors.mT @ other.vectors).square()

    def completed(self) -> Basis:
        """All p columns: the missing ones are any orthonormal complement."""
        if self.full or self.vectors is None:
            return self
        complement = torch.linalg.qr(self.vectors, mode="complete").Q[:, :, self.vectors.shape[2] :]
        return Basis(torch.cat([self.vectors, complement], 2), self.size)


def _first_group(U: Tensor, x: Tensor) -> Tensor:
    """Without the group axis where there is one group, so that a product stays one large matrix product."""
    return U[0] if len(U) == 1 else U


@dataclass(eq=False)
class Eigenform:
    """One block by its eigenvalues: values [G, r_left, r_right] in the bases, `rest` [] on what they leave out."""

    left: Basis
    right: Basis
    values: Tensor
    rest: Tensor

    def state(self) -> dict[str, Any]:
        """As plain tensors and numbers, from which `of_state` makes it again."""
        sides = {"left": [self.left.vectors, self.left.size], "right": [self.right.vectors, self.right.size]}
        return {"values": self.values, "rest": self.rest, **sides}

    def carried(self, to: Eigenform) -> Eigenform:
        """The diagonal of this matrix in the basis of `to`: sum_kl (u_i . u'_k)^2 (w_j . w'_l)^2 values[k, l]."""
        left, right = self.left.overlap(to.left), self.right.overlap(to.right)
        values = self.values if left is None else left.mT @ self.values
        return replace(to, values=values if right is None else values @ right)

    @staticmethod
    def of_state(state: dict[str, Any]) -> Eigenform:
        return Eigenform(Basis(*state["left"]), Basis(*state["right"]), state["values"], state["rest"])

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def size(self) -> int:
        return len(self.values) * self.left.size * self.right.size

    @property
    def full(self) -> bool:
        return self.left.full and self.right.full

    @property
    def left_out(self) -> int:
        """How many eigenvalues are `rest`."""
        return self.size - self.values.numel()

    def map(self, function: Callable[[Tensor], Tensor]) -> Eigenform:
        """The same function of every eigenvalue: f(A)."""
        return replace(self, values=function(self.values), rest=function(self.rest))

    def to(self, dtype: torch.dtype) -> Eigenform:
        if self.values.dtype == dtype:
            return self
        return Eigenform(self.left.to(dtype), self.right.to(dtype), self.values.to(dtype), self.rest.to(dtype))

    def shares_basis(self, other: Eigenform) -> bool:
        if self.size != other.size:
            return False
        if not (self.values.numel() and other.values.numel()):  # a multiple of the identity has every basis
            return True
        same_shape = self.values.shape == other.values.shape
        return same_shape and self.left.equals(other.left) and self.right.equals(other.right)

    def plus(self, other: Eigenform) -> Eigenform:
        """The sum with a block of the same basis, or with a multiple of the identity."""
        first, second = (self, other) if self.values.numel() else (other, self)
        added = second.values if second.values.numel() else second.rest
        return replace(first, values=first.values + added, rest=first.rest + second.rest)

    def evened(self, values: Tensor) -> Tensor:
        """Values that were measured along these eigenvectors, on other data; see `evened`."""
        return evened(values, self.null_spaces())

    def null_spaces(self) -> NullSpaces:
        """Which columns of each basis [G, r] span the null space of its factor: there any others would do as well.
        None for unit vectors, and where there are fewer than two."""
        largest = self.values.amax((1, 2), keepdim=True)
        found = []
        for basis, own in ((self.left, self.values.amax(2)), (self.right, self.values.amax(1))):
            null = own <= 10 * torch.finfo(own.dtype).eps * basis.size * largest.squeeze(2)
            found.append(None if basis.vectors is None or bool((null.sum(1) < 2).all()) else null)
        return found[0], found[1]

    # --- products ------------------------------------------------------------------------------------------------

    @precisely
    def rotated(self, rows: Tensor) -> Tensor:
        """Coefficients of rows [K, D] in the basis, [K, G, r_left, r_right]."""
        if self.right.size == len(self.values) == 1:  # a vector's block: one product instead of K
            c = rows if self.left.vectors is None else rows @ self.left.vectors[0]
            c = c.view(len(rows), 1, -1, 1)
            return c if self.right.vectors is None else c * self.right.vectors[0]
        V = rows.reshape(-1, len(self.values), self.left.size, self.right.size)
        if self._left_first:
            return self.right.rotated(self.left.rotated(V).mT).mT
        return self.left.rotated(self.right.rotated(V.mT).mT)

    @precisely
    def restored(self, c: Tensor) -> Tensor:
        """Vectors [K, D] with the given coefficients, 0 on what the basis leaves out."""
        if self._left_first:
            V = self.left.restored(self.right.restored(c.mT).mT)
        else:
            V = self.right.restored(self.left.restored(c).mT).mT
        return V.reshape(len(c), -1)

    @property
    def _left_first(self) -> bool:
        """Which of the two sides to rotate first: the order with fewer multiplications."""
        (r, s), p, q = self.values.shape[1:], self.left.size, self.right.size
        return q * r * (p + s) <= p * s * (q + r)

    @cached_property
    def _plain(self) -> tuple[Pair, Pair, Tensor] | None:
        """(U, U^T) and (W, W^T) without their groups, None for unit vectors, and the values of the shape of what they
        multiply: [p, q], or [p] for a vector; None where there are several groups, or a basis is thin."""
        if len(self.values) > 1 or not self.full:
            return None
        U, W = (None if basis.vectors is None else (basis.vectors[0], basis.vectors[0].mT) for basis in
                (self.left, self.right))  # fmt: skip
        if self.right.size == 1:  # a basis of length one: its sign is there twice
            return U, None, self.values.view(-1)
        return U, W, self.values[0]

    def applied(self, g: Tensor) -> Tensor:
        """`@` with one gradient, of its dtype; for one group without bookkeeping, and in the arithmetic that is on."""
        if (plain := self._plain) is None:
            return (self @ g.to(self.values.dtype)).to(g.dtype)
        left, right, values = plain
        c = g if g.dtype == values.dtype else g.to(values.dtype)
        c = c if c.shape == values.shape else c.reshape(values.shape)  # channels_last has no such view
        c = c if left is None else left[1] @ c
        c = (c if right is None else c @ right[0]) * values
        c = c if right is None else c @ right[1]
        c = c if left is None else left[0] @ c
        c = c if c.shape == g.shape else c.view(g.shape)
        return c if c.dtype == g.dtype else c.to(g.dtype)

    @precisely
    def product(self, rows: Tensor) -> Tensor:
        """Products with the K rows of a [K, D] tensor, as rows."""
        if not self.values.numel():
            return self.rest * rows
        if self.full:
            return self.restored(self.rotated(rows) * self.values)
        c = self.rotated(rows).mul_(self.values - self.rest)
        if len(rows) == len(self.values) == 1:  # the sum joins the last product: it is as long as the vector itself
            return self._restored_onto(rows, c)
        return self.restored(c).addcmul_(self.rest, rows)

    def _restored_onto(self, row: Tensor, c: Tensor) -> Tensor:
        """rest times one row [1, D], plus the vector with coefficients c [1, 1, r_left, r_right]."""
        V, c = row.reshape(self.left.size, self.right.size), c[0, 0]
        U, W = (None if b.vectors is None else b.vectors[0] for b in (self.left, self.right))
        rest = self.rest.item()
        if U is None or (W is not None and not self._left_first):
            c = c if U is None else U @ c
            found = torch.addmm(V, c, W.mT, beta=rest) if W is not None else torch.add(c, V, alpha=rest)
        else:
            found = torch.addmm(V, U, c if W is None else c @ W.mT, beta=rest)
        return found.view(1, -1)

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with a vector of D numbers in any shape (a gradient, say), in that shape; or with [D, K]."""
        return matmul(self.product, self.size, v)

    # --- answers -------------------------------------------------------------------------------------------------

    def to_dense(self) -> Tensor:
        """[D, D]."""
        eye = torch.eye(self.size, dtype=self.values.dtype, device=self.values.device)
        dense = self.product(eye)
        return (dense + dense.mT).div_(2)

    @precisely
    def diagonal(self) -> Tensor:
        """[D]."""
        shift = self.values - self.rest
        left, right = self.left, self.right
        if left.vectors is not None:
            shift = left.squares(shift) @ shift
        if right.vectors is not None:
            shift = shift @ right.squares(shift).mT
        return (shift + self.rest).reshape(-1)

    def trace(self) -> Tensor:
        return self.values.sum() + self.left_out * self.rest

    def frobenius_norm(self) -> Tensor:
        return (self.values.square().sum() + self.left_out * self.rest.square()).sqrt()

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest eigenvalue."""
        found = self.values.reshape(-1) if not self.left_out else torch.cat([self.values.reshape(-1), self.rest[None]])
        return found.min(), found.max()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det(A + damping I); see `inverse` for what raises."""
        check_positive({"the block": self}, damping)
        damped = self.map(lambda s: s + damping)
        found = damped.values.log().sum()
        return found + self.left_out * damped.rest.log() if self.left_out else found

    def inverse(self, damping: float = 0.0) -> Eigenform:
        """(A + damping I)^-1, exact; raises ValueError where an eigenvalue + damping is not safely positive."""
        check_positive({"the block": self}, damping)
        return self.map(lambda s: 1 / (s + damping))

    def sqrt(self) -> Eigenform:
        """The symmetric root A^(1/2) of a positive semi-definite block."""
        check_semidefinite({"the block": self})
        return self.map(lambda s: s.clamp(min=0).sqrt())

    @precisely
    def completed(self) -> Eigenform:
        """The same with complete bases, so that every eigenvalue has its vectors."""
        if self.full:
            return self
        left, right = self.left.completed(), self.right.completed()
        values = self.rest.expand(len(self.values), left.size, right.size).clone()
        values[:, : self.values.shape[1], : self.values.shape[2]] = self.values
        return Eigenform(left, right, values, self.rest)

    @precisely
    def vectors(self, at: Tensor) -> Tensor:
        """Eigenvectors [k, D] of the eigenvalues at flat places of `values` [k]."""
        c = self.values.new_zeros(len(at), self.values.numel())
        c[torch.arange(len(at), device=at.device), at] = 1
        return self.restored(c.view(-1, *self.values.shape))


NullSpaces = tuple[Tensor | None, Tensor | None]


def evened(values: Tensor, null: NullSpaces) -> Tensor:
    """Values [G, r_left, r_right], within the null space of a factor their mean.

    Which basis of a null space a decomposition returns is arbitrary, and so is what other data measures along it; the
    mean is the same for all of them.
    """
    for axis, mask in ((1, null[0]), (2, null[1])):
        if mask is not None:
            mask = mask.unsqueeze(3 - axis)
            mean = (values * mask).sum(axis, keepdim=True) / mask.sum(axis, keepdim=True).clamp(min=1)
            values = torch.where(mask, mean, values)
    return values


def matmul(product: Callable[[Tensor], Tensor], size: int, v: Tensor) -> Tensor:
    """A product of rows as one with v: D numbers in any shape, or [D, K]."""
    if v.numel() == size:
        return product(v.reshape(1, -1)).view(v.shape)
    if v.dim() != 2 or len(v) != size:
        raise ValueError(
            f"the vector has shape {tuple(v.shape)}; expected {size} numbers in any shape, or [{size}, K]."
        )
    return product(v.mT).mT


def multiple_of_identity(value: Tensor, size: int) -> Eigenform:
    """value * I over `size` numbers: no vector of its own, all is `rest`."""
    none = value.new_zeros(1, size, 0)
    return Eigenform(Basis(none, size), Basis(None, 1), value.new_zeros(1, 0, 1), value)


def diagonal_form(values: Tensor) -> Eigenform:
    """A diagonal matrix, values [D]."""
    return Eigenform(Basis(None, len(values)), Basis(None, 1), values.view(1, -1, 1), values.new_zeros(()))


def check_positive(forms: dict[str, Eigenform], damping: float) -> None:
    """Raise ValueError where an eigenvalue + damping is below eps times the largest; `forms` by their names."""
    check_damping(damping)
    lows, highs = zip(*(form.extremes() for form in forms.values()), strict=True)
    lows, highs = torch.stack(lows).double() + damping, torch.stack(highs).double() + damping
    highest = highs.max().item()
    eps = torch.finfo(next(iter(forms.values())).values.dtype).eps
    for name, low in zip(forms, lows.tolist(), strict=True):
        if not low > eps * highest:
            raise ValueError(
                f"{name}: the smallest eigenvalue plus damping is {low:.4g} and the largest of all {highest:.4g}; "
                f"expected a positive definite matrix. Increase damping (now {damping})."
            )


def check_semidefinite(forms: dict[str, Eigenform]) -> None:
    """Raise ValueError where an eigenvalue is negative beyond rounding; `forms` by their names."""
    for name, form in forms.items():
        low, high = (t.item() for t in form.extremes())
        if not low >= -(torch.finfo(form.values.dtype).eps ** 0.5) * max(abs(low), abs(high)):
            raise ValueError(f"{name}: the smallest eigenvalue is {low:.4g}; expected a positive semi-definite "
                             "matrix, which alone has a real root.")  # fmt: skip


def decomposed(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues [G, p], descending, and vectors [G, p, p] of symmetric matrices [G, p, p]; `what` is for errors.

    Raises `torch.linalg.LinAlgError` with the name and the condition number where no precision helps.
    """
    try:
        if len(matrix) == 1 or matrix.shape[1] <= BATCHED:
            values, vectors = eigh(matrix)
            return values, vectors.contiguous()
        values, vectors = zip(*[eigh(m) for m in matrix], strict=True)
        return torch.stack(values), torch.stack(vectors)
    except LinAlgError as failure:
        raise LinAlgError(f"{what}, {list(matrix.shape[1:])}, has no eigendecomposition: {failure} Its condition "
                          f"number is {_condition(matrix)}. Look for exploding activations or gradients in this layer, "
                          "or compute in float64.") from None  # fmt: skip


def _condition(matrix: Tensor) -> str:
    if not torch.isfinite(matrix).all():
        return "undefined"
    try:
        s = torch.linalg.svdvals(matrix.double())
        return f"{(s[:, 0] / s[:, -1]).max().item():.3g}"
    except LinAlgError:
        return "unknown (its singular values do not converge either)"
