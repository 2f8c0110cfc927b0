"""A block left (x) right of curvature, whatever its two factors are kept as, and all that is done with one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from paraboloid.linalg.eigenform import Basis, Eigenform, decomposed, matmul
from paraboloid.linalg.operand import LinAlgError, check_damping
from paraboloid.passes.modes import precisely

FEW = ("rows", "complement")  # kinds that are known by rows


@dataclass(eq=False)
class Side:
    """One symmetric positive semi-definite factor for each of G groups.

    kind "matrix": data [G, p, p].  "diagonal": [G, p].  "rows": [G, R, p], the factor being rows^T rows; with R < p
    it has at most R eigenvalues other than zero, which the [R, R] matrix of the rows' inner products has too.
    "complement": rows [G, R, p] and a number `rest` [G], the factor being rest I - rows^T rows: such rows' inverse.
    """

    kind: Literal["matrix", "diagonal", "rows", "complement"]
    data: Tensor
    rest: Tensor | None = None

    @property
    def is_short(self) -> bool:
        """Whether two products with the rows cost no more than one with the matrix."""
        return self.kind in ("rows", "complement") and 2 * self.data.shape[1] <= self.size

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def size(self) -> int:
        return self.data.shape[-1]

    def equals(self, other: Side) -> bool:
        same = self.kind == other.kind != "complement" and self.data.dtype == other.data.dtype
        return same and self.data.shape == other.data.shape and torch.equal(self.data, other.data)

    @staticmethod
    def of(factor: Tensor, groups: int) -> Side:
        """A factor as `Kron` is given it."""
        factor = factor if groups > 1 else factor.unsqueeze(0)
        return Side("diagonal" if factor.dim() == 2 else "matrix", factor)

    def tensor(self) -> Tensor:
        """[G, p, p], or [G, p] of a diagonal; without G where it is one."""
        found = self.data if self.kind in ("diagonal", "matrix") else self.dense()
        return found if len(found) > 1 else found[0]

    @precisely
    def times(self, x: Tensor) -> Tensor:
        """The factor times x [.. G p k]."""
        if self.kind == "diagonal":
            return self.data.unsqueeze(-1) * x
        data = self.data[0] if len(self.data) == 1 else self.data
        if self.kind == "matrix":
            return data @ x
        found = data.mT @ (data @ x)
        return found if self.rest is None else self.rest.view(-1, 1, 1) * x - found

    @precisely
    def dense(self) -> Tensor:
        """[G, p, p]."""
        if self.kind == "matrix":
            return self.data
        if self.kind == "diagonal":
            return self.data.diag_embed()
        found = self.data.mT @ self.data
        return (
            found
            if self.rest is None
            else self.rest.view(-1, 1, 1) * torch.eye(self.size, dtype=found.dtype, device=found.device) - found
        )

    def diagonal(self) -> Tensor:
        """[G, p]."""
        if self.kind == "diagonal":
            return self.data
        if self.kind == "matrix":
            return self.data.diagonal(0, 1, 2)
        found = self.data.square().sum(1)
        return found if self.rest is None else self.rest.view(-1, 1) - found

    def trace(self) -> Tensor:
        """[G]."""
        return self.diagonal().sum(1)

    @precisely
    def norm(self) -> Tensor:
        """Frobenius norm, [G]."""
        data = self.dense() if self.kind == "complement" else self.data
        data = data @ data.mT if self.kind == "rows" else data
        return data.flatten(1).norm(dim=1)

    @precisely
    def basis(self, what: str) -> tuple[Basis, Tensor]:
        """Eigenvectors and eigenvalues [G, r]; r < p for few rows.  What is negative by rounding becomes zero."""
        if self.kind == "diagonal":
            return Basis(None, self.size), self.data
        if self.size == 1:
            return Basis(None, 1), self.dense()[..., 0]
        if self.kind == "rows" and self.data.shape[1] < self.data.shape[2]:
            Q, R = torch.linalg.qr(self.data.mT)  # rows = R^T Q^T: an exactly orthonormal basis, whatever the rank
            values, vectors = decomposed(R @ R.mT, what)
            return Basis(Q @ vectors, self.size), values.clamp(min=0)
        values, vectors = decomposed(self.dense(), what)
        rounding = torch.finfo(values.dtype).eps * self.size * values.abs().amax(1, keepdim=True)
        return Basis(vectors, self.size), values.where((values > 0) | (values < -rounding), 0)

    @precisely
    def along(self, basis: Basis) -> Tensor:
        """u_i . (factor u_i) for the columns u_i of a basis, [G, r]."""
        return self.diagonal() if basis.vectors is None else (basis.vectors * self.times(basis.vectors)).sum(1)

    def scaled(self, factor: Tensor) -> Side:
        """factor [G] times it, for numbers of at least 0."""
        rest = None if self.rest is None else self.rest * factor
        factor = factor.sqrt() if self.kind in ("rows", "complement") else factor
        return Side(self.kind, self.data * factor.view(-1, *(1,) * (self.data.dim() - 1)), rest)

    def to(self, dtype: torch.dtype) -> Side:
        return Side(self.kind, self.data.to(dtype), None if self.rest is None else self.rest.to(dtype))

    def mixed(self, other: Side, share: float) -> Side:
        """(1 - share) times it plus share times another: by the rows of both while these are few, else in its place."""
        kinds = {self.kind, other.kind}
        if kinds == {"rows"}:
            both = Side("rows", torch.cat([self.data * (1 - share) ** 0.5, other.data * share**0.5], 1))
            if both.is_short:
                return both
        if kinds & {"diagonal"} or "rows" not in kinds:
            self.data.lerp_(other.data, share)
            return self
        dense = self.dense()
        if other.kind == "rows":
            return Side("matrix", dense.baddbmm_(other.data.mT, other.data, beta=1 - share, alpha=share))
        return Side("matrix", dense.lerp_(other.data, share))

    def inverse(self, shift: Tensor, what: str) -> Side:
        """(factor + shift I)^-1 for a shift [G]; raises ValueError where that is not safely positive definite."""
        if self.kind == "diagonal":
            shifted = self.data + shift.unsqueeze(1)
            if not (shifted > torch.finfo(shifted.dtype).eps * shifted.max()).all():
                raise ValueError(
                    f"{what} plus its share of the damping has the smallest entry {shifted.min():.4g} and the largest "
                    f"{shifted.max():.4g}; expected positive numbers. Increase damping."
                )
            return Side("diagonal", 1 / shifted)
        if self.kind == "rows" and self.is_short and (shift > 0).all():
            return self._complement(shift, what)
        return Side("matrix", torch.cholesky_inverse(self._factorised(self.dense().clone(), shift, what)))

    def _complement(self, shift: Tensor, what: str) -> Side:
        """(R^T R + s I)^-1 = (I - R^T (R R^T + s I)^-1 R) / s: as large as the rows are many."""
        L = self._factorised(self.data @ self.data.mT, shift, what)
        Q = torch.linalg.solve_triangular(L, self.data, upper=False)
        return Side("complement", Q / shift.sqrt().view(-1, 1, 1), 1 / shift)

    @staticmethod
    def _factorised(shifted: Tensor, shift: Tensor, what: str) -> Tensor:
        """The Cholesky factor of a matrix, to which the shift is added in its place."""
        shifted.diagonal(dim1=1, dim2=2).add_(shift.unsqueeze(1))
        scale = shifted.diagonal(dim1=1, dim2=2).amax(1)
        L, info = torch.linalg.cholesky_ex(shifted)
        smallest = L.diagonal(dim1=1, dim2=2).square().amin(1)
        if (info != 0).any() or not (smallest > torch.finfo(shifted.dtype).eps * scale).all():
            raise ValueError(f"{what}, {list(shifted.shape[1:])}, plus its share {shift.tolist()} of the damping is "
                             "singular; expected a positive definite matrix. Increase damping.")  # fmt: skip
        return L


class Kron:
    """A block left (x) right, in the parameter's own row-major order.

    `left` is [p, p] and `right` [q, q], symmetric positive semi-definite; a one-dimensional [p] or [q] is a diagonal.
    A grouped convolution has one pair for each of its G groups, [G, p, p] and [G, q, q]; its block is block-diagonal.
    A factor may be given as a `Side` too, by its rows for instance.

        damped = kron.inverse(damping=1e-3)            # exact, by eigendecompositions: made once, used often
        step = damped @ gradient                       # of the parameter's shape

    `name` in the methods is the parameter's, for error messages.
    """

    def __init__(self, left: Tensor | Side, right: Tensor | Side, groups: int = 1):
        self.groups = groups = len(left.data) if isinstance(left, Side) else groups
        left = left if isinstance(left, Side) else Side.of(left, groups)
        self.sides = left, right if isinstance(right, Side) else Side.of(right, groups)
        """The factors with all their groups, as they are kept."""

    @cached_property
    def left(self) -> Tensor:
        return self.sides[0].tensor()

    @cached_property
    def right(self) -> Tensor:
        return self.sides[1].tensor()

    @property
    def dtype(self) -> torch.dtype:
        return self.sides[0].data.dtype

    @property
    def device(self) -> torch.device:
        return self.sides[0].data.device

    @property
    def size(self) -> int:
        """D = G p q."""
        left, right = self.sides
        return self.groups * left.size * right.size

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def __repr__(self) -> str:
        return f"Kron(left={self.left}, right={self.right}, groups={self.groups})"

    def to(self, dtype: torch.dtype) -> Kron:
        if self.dtype == dtype:
            return self
        left, right = self.sides
        return Kron(left.to(dtype), right.to(dtype))

    def state(self) -> list[list[Any]]:
        """As plain tensors and strings, from which `of_state` makes it again."""
        return [[side.kind, side.data, *([] if side.rest is None else [side.rest])] for side in self.sides]

    @staticmethod
    def of_state(state: list[list[Any]]) -> Kron:
        left, right = (Side(*parts) for parts in state)
        return Kron(left, right)

    # --- products and numbers ------------------------------------------------------------------------------------

    @cached_property
    def _plain(self) -> tuple[Tensor, Tensor | float, tuple[int, int]] | None:
        """Both factors without their groups, the right one as a number where it is one for a dense left one, and their
        sizes; None where there are several groups, or a factor is known by rows."""
        first, second = self.sides
        if self.groups > 1 or first.kind in FEW or second.kind in FEW:
            return None
        left, right = first.data[0], second.data[0]
        number = right.numel() == 1 and left.dim() == 2 and not right.is_cuda  # reading it would wait for the device
        return left, float(right) if number else right, (len(left), len(right))

    def applied(self, g: Tensor) -> Tensor:
        """`@` with one gradient, of its dtype; for one group without bookkeeping, and in the arithmetic that is on."""
        if (plain := self._plain) is None:
            return (self @ g.to(self.dtype)).to(g.dtype)
        left, right, sizes = plain
        V = g if g.dtype == left.dtype else g.to(left.dtype)
        if not isinstance(right, Tensor):
            V = V if V.dim() == 1 else V.reshape(-1)
            V = torch.addmv(V, left, V, beta=0, alpha=right)
        else:
            V = V if V.shape == sizes else V.reshape(sizes)  # no view in channels_last
            V = V * right if right.dim() == 1 or right.numel() == 1 else V @ right
            V = left @ V if left.dim() == 2 else left.unsqueeze(1) * V
        V = V if V.shape == g.shape else V.view(g.shape)
        return V if V.dtype == g.dtype else V.to(g.dtype)

    def product(self, rows: Tensor) -> Tensor:
        """Products with the K rows of a [K, D] tensor, as rows."""
        left, right = self.sides
        V = rows.reshape(-1, self.groups, left.size, right.size)
        return right.times(left.times(V).mT).mT.reshape(rows.shape)

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with a vector of D = G p q numbers in any shape, in that shape; or with [D, K]."""
        return matmul(self.product, self.size, v)

    @precisely
    def to_dense(self) -> Tensor:
        """The block as a matrix, [D, D]."""
        left, right = (side.dense().contiguous() for side in self.sides)
        return torch.block_diag(*(torch.kron(a, b) for a, b in zip(left, right, strict=True)))

    def diagonal(self) -> Tensor:
        """[D]."""
        left, right = self.sides
        return (left.diagonal().unsqueeze(2) * right.diagonal().unsqueeze(1)).reshape(-1)

    def trace(self) -> Tensor:
        left, right = self.sides
        return (left.trace() * right.trace()).sum()

    def frobenius_norm(self) -> Tensor:
        left, right = self.sides
        return (left.norm() * right.norm()).norm()

    # --- functions of it -----------------------------------------------------------------------------------------

    def eigenform(self, name: str = "the block", known: list[Decomposed] | None = None) -> Eigenform:
        """The block by its eigenvalues (products of the factors') and eigenvectors, for every function of it.

        `known` collects decompositions: a factor that equals an earlier one (a layer's weight and bias have the same
        gradient factor, if used at one position) takes that one's.

        Raises `torch.linalg.LinAlgError` with the name and the condition number where a factor has no decomposition.
        """
        known = [] if known is None else known
        left, left_values = _decomposed_once(self.sides[0], f"{name}: the left factor", known)
        right, right_values = _decomposed_once(self.sides[1], f"{name}: the right factor", known)
        values = left_values.unsqueeze(2) * right_values.unsqueeze(1)
        if not values.isfinite().all():
            raise LinAlgError(f"{name}: its factors have eigenvalues up to {left_values.max():.4g} and "
                              f"{right_values.max():.4g}, whose product is beyond {values.dtype}; expected finite "
                              "numbers. Compute in float64, or scale the inputs.")  # fmt: skip
        return Eigenform(left, right, values, values.new_zeros(()))

    def along(self, form: Eigenform) -> Eigenform:
        """Its values along given eigenvectors in the place of theirs, diag(U^T left U) (x) diag(W^T right W); within a
        null space their mean (see `evened`)."""
        left, right = (side.along(basis) for side, basis in zip(self.sides, (form.left, form.right), strict=True))
        return replace(form, values=form.evened(left.unsqueeze(2) * right.unsqueeze(1)))

    def inverse(self, damping: float = 0.0, split: str | None = None, name: str = "the block") -> Eigenform | Kron:
        """(left (x) right + damping I)^-1, exact; or with split="pi" or "same" a factored one (see `split_inverse`).

        Raises ValueError where an eigenvalue + damping is below eps times the largest.
        """
        if check_split(split) is None:
            return self.eigenform(name).inverse(damping)
        return self.split_inverse(damping, name, split == "same")

    @precisely
    def split_inverse(self, damping: float, name: str = "the block", same: bool = False) -> Kron:
        """(left + pi sqrt(damping) I)^-1 (x) (right + sqrt(damping) / pi I)^-1, an approximation of the damped inverse.

        pi^2 is the mean eigenvalue of left over that of right.  Needs no eigendecomposition, only two inverses.  Where
        one side is a number (a bias, a single output) nothing is split: (number * other + damping I)^-1, exact.
        same: (left + damping I)^-1 (x) (right + damping I)^-1 instead, both factors damped alike.
        Source: Martens & Grosse 2015, arXiv:1503.05671, section 6.3.
        """
        if not check_damping(damping) >= 0:
            raise ValueError(f"damping is {damping}; expected a number of at least 0 to split between the factors.")
        left, right = self.sides
        shift = torch.full((self.groups,), float(damping), dtype=self.dtype, device=self.device)
        if right.size == 1:
            whole = left.scaled(right.dense().flatten()).inverse(shift, f"{name}: the left factor")
            return Kron(whole, Side("matrix", torch.ones_like(right.dense())))
        if left.size == 1:
            whole = right.scaled(left.dense().flatten()).inverse(shift, f"{name}: the right factor")
            return Kron(Side("matrix", torch.ones_like(left.dense())), whole)
        if same:
            return Kron(
                left.inverse(shift, f"{name}: the left factor"), right.inverse(shift, f"{name}: the right factor")
            )
        pi = ((left.trace() / left.size) / (right.trace() / right.size)).sqrt()
        pi = pi.where(torch.isfinite(pi) & (pi > 0), 1.0)
        return Kron(
            left.inverse(pi * damping**0.5, f"{name}: the left factor"),
            right.inverse(damping**0.5 / pi, f"{name}: the right factor"),
        )

    def sqrt(self, name: str = "the block") -> Eigenform:
        """The symmetric root."""
        return self.eigenform(name).sqrt()

    def logdet(self, damping: float = 0.0, name: str = "the block") -> Tensor:
        """log det(left (x) right + damping I)."""
        return self.eigenform(name).logdet(damping)


SPLITS = (None, "pi", "same")


def check_split(split: Any) -> str | None:
    """`split`, or ValueError where it names no way of damping."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected None (damping is exact), or 'pi' or 'same' (it is split "
                         "between the two Kronecker factors of each block).")  # fmt: skip
    return split


Decomposed = tuple[Side, Basis, Tensor]


def _decomposed_once(side: Side, what: str, known: list[Decomposed]) -> tuple[Basis, Tensor]:
    for other, basis, values in known:
        if side.data.shape == other.data.shape and side.equals(other):
            return basis, values
    known.append((side, *side.basis(what)))
    return known[-1][1:]
