"""Low rank plus diagonal: a few eigenvectors of a curvature, and a number or a vector for all that they leave out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.eigen import eigh
from paraboloid.linalg.eigenform import Basis, Eigenform
from paraboloid.linalg.operand import check_damping
from paraboloid.operators.damping import whole_damping
from paraboloid.operators.linear_operator import LinearOperator
from paraboloid.operators.structured.diagonalised import Diagonalised
from paraboloid.passes.modes import own_arithmetic, precisely


class LowRank(LinearOperator, kind="LowRank"):
    """V diag(values) V^T + diagonal, [D, D].

    parameters  by name, in the order of flat vectors
    vectors     V [D, k], orthonormal or not
    values      [k], or a symmetric [k, k] in the middle
    diagonal    a number, or [D]

    With a number its eigenvectors are those of V: all answers are exact functions of the eigenvalues.  With a vector,
    inverse, solve and logdet are exact by Woodbury's identity, eigenpairs come from products, and `sqrt_matmul` takes
    the root B with B B^T = A that is not symmetric.

    Raises ValueError for shapes that do not fit.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], vectors: Tensor, values: Tensor, diagonal: float | Tensor = 0.0
    ):
        self.parameters = {name: p.detach() for name, p in parameters.items()}
        size = self.shape[0]
        if vectors.dim() != 2 or len(vectors) != size:
            raise ValueError(f"the vectors have shape {tuple(vectors.shape)}; expected [{size}, k].")
        k = vectors.shape[1]
        if values.shape not in ((k,), (k, k)):
            raise ValueError(f"the values have shape {tuple(values.shape)}; expected [{k}] or [{k}, {k}].")
        diagonal = torch.as_tensor(diagonal, dtype=self.dtype, device=self.device)
        if diagonal.shape not in ((), (size,)):
            raise ValueError(f"the diagonal has shape {tuple(diagonal.shape)}; expected a number or [{size}].")
        self._given, self.remainder = (vectors.to(self.dtype), values.to(self.dtype)), diagonal

    @cached_property
    def _pairs(self) -> tuple[Tensor, Tensor]:
        vectors, core = self._given
        return _orthonormal(vectors, core.diag() if core.dim() == 1 else core)

    @property
    def vectors(self) -> Tensor:
        """Orthonormal, [D, k]."""
        return self._pairs[0]

    @property
    def values(self) -> Tensor:
        """Descending, [k]."""
        return self._pairs[1]

    def _state(self) -> dict[str, Any]:
        return {"vectors": self.vectors, "values": self.values, "diagonal": self.remainder}

    @classmethod
    def _of_state(cls, state: dict[str, Any], parameters: Mapping[str, Tensor]) -> LowRank:
        return cls(parameters, state["vectors"], state["values"], state["diagonal"])

    @classmethod
    def from_operator(
        cls, A: LinearOperator, k: int, diagonal: float | Tensor | str = "rest", **options: Any
    ) -> LowRank:
        """The k algebraically largest eigenpairs of A, and a diagonal.

        "rest" is what they leave of A's own, so that the diagonal is A's (negative in places, for an indefinite A).
        `options` are those of `eigsh`.
        """
        values, vectors = A.eigsh(k, **options)
        if isinstance(diagonal, str):
            if diagonal != "rest":
                raise ValueError(f"diagonal is {diagonal!r}; expected 'rest', a number or a tensor [{A.shape[0]}].")
            diagonal = A.diagonal() - (vectors.square() @ values)
            diagonal = diagonal.where(diagonal.abs() > 10 * torch.finfo(values.dtype).eps * values.abs().max(), 0)
        return cls(A.parameters, vectors, values, diagonal)

    @classmethod
    def from_root(cls, parameters: Mapping[str, Tensor], root: Tensor, diagonal: float | Tensor = 0.0) -> LowRank:
        """root^T root + diagonal, for a root [R, D]: rows sqrt(a) J_n^T s_v are a root of the GGN, see "sqrt_ggn"."""
        if root.dim() != 2:
            raise ValueError(f"the root has shape {tuple(root.shape)}; expected [R, D], one vector per row.")
        return cls(parameters, root.T, root.new_ones(len(root)), diagonal)

    @property
    def scalar(self) -> bool:
        """Whether the diagonal is a multiple of the identity."""
        return self.remainder.dim() == 0

    @property
    def exact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.scalar

    @cached_property
    def eigenform(self) -> Diagonalised:
        """The same matrix by its eigenvalues and eigenvectors, where the diagonal is a number."""
        if not self.scalar:
            raise NotImplementedError(
                "low rank plus a diagonal vector has no eigenvectors in closed form; expected a number as its "
                "diagonal. Use eigsh(k), inverse(damping), logdet(damping) or solve(b, damping), which do without."
            )
        size = self.shape[0]
        values = (self.values + self.remainder).view(1, -1, 1)
        form = Eigenform(Basis(self.vectors.unsqueeze(0), size), Basis(None, 1), values, self.remainder)
        return Diagonalised(self.parameters, [form], [list(range(len(self.parameters)))])

    def _structured(self, what: str) -> Diagonalised:
        return self.eigenform

    @precisely
    def _product(self, rows: Tensor) -> Tensor:
        return self.remainder * rows + ((rows @ self.vectors) * self.values) @ self.vectors.T

    @precisely
    def diagonal(self, samples=None, seed=0):
        if samples is not None:
            return super().diagonal(samples, seed)
        return self.vectors.square() @ self.values + self.remainder

    @precisely
    def frobenius_norm(self) -> Tensor:
        diagonal = self.remainder.expand(self.shape[0])
        cross = (self.vectors.square() @ self.values) @ diagonal
        return (self.values.square().sum() + 2 * cross + diagonal.square().sum()).clamp(min=0).sqrt()

    def solve(self, b: Any, damping: float = 0.0, tol=None, max_iterations=None, preconditioner=None) -> Any:
        """x with (A + damping I) x = b, exact; the arguments of an iterative solver have no meaning here."""
        return self.inverse(damping) @ b

    @precisely
    def inverse(self, damping: float = 0.0, split: str | None = None) -> Diagonalised | LowRank:
        """(A + damping I)^-1, exact, in the same form.

        Raises ValueError where an eigenvalue + damping is below eps times the largest, and for a `split`.
        """
        whole_damping(self, split)
        if self.scalar:
            return self.eigenform.inverse(damping)
        e, U, mu = self._whitened(damping)
        scaled = U / e.sqrt().unsqueeze(1)
        return LowRank(self.parameters, scaled, -mu / (1 + mu), 1 / e)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det(A + damping I); raises as `inverse` does."""
        if self.scalar:
            return self.eigenform.logdet(damping)
        e, _, mu = self._whitened(damping)
        return e.log().sum() + torch.log1p(mu).sum()

    @precisely
    def sqrt_matmul(self, v: Any) -> Any:
        """B v with B B^T = A, for a positive definite A (the symmetric root where the diagonal is a number)."""
        if self.scalar:
            return self.eigenform.sqrt_matmul(v)
        e, U, mu = self._whitened(0.0)
        rows = self.columns(v)
        columns = rows if rows.dim() == 2 else rows.unsqueeze(1)
        found = e.sqrt().unsqueeze(1) * (columns + U @ (((1 + mu).sqrt() - 1).unsqueeze(1) * (U.T @ columns)))
        return self.like(found if rows.dim() == 2 else found.squeeze(1), v)

    @precisely
    def _whitened(self, damping: float) -> tuple[Tensor, Tensor, Tensor]:
        """e [D], U [D, k] orthonormal and mu [k] with A + damping I = e^(1/2) (I + U diag(mu) U^T) e^(1/2)."""
        e = self.remainder + check_damping(damping)
        lowest, highest = e.min().item(), (self.diagonal() + damping).max().item()
        eps = torch.finfo(self.dtype).eps
        if lowest > eps * highest:
            U, mu = _orthonormal(self.vectors / e.sqrt().unsqueeze(1), self.values.diag())
            lowest = lowest * min(1.0, 1 + mu.min().item()) if len(mu) else lowest
            if lowest > eps * highest:
                return e, U, mu
        raise ValueError(f"the smallest eigenvalue plus damping may be as small as {lowest:.4g}, and the largest of "
                         f"the diagonal is {highest:.4g}; expected a positive definite matrix. Increase damping (now "
                         f"{damping}).")  # fmt: skip


def _orthonormal(V: Tensor, core: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal vectors [D, k] and values [k], descending, of V core V^T; at most D of them."""
    with own_arithmetic(V.device):
        Q, R = torch.linalg.qr(V)
        values, vectors = eigh(R @ core @ R.T)
        return Q @ vectors, values
