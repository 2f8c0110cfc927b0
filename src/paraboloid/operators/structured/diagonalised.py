"""An operator by its eigenvalues: a block for each parameter (or group of parameters), each in an eigenbasis."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paraboloid.linalg.eigenform import Eigenform, check_positive, check_semidefinite
from paraboloid.linalg.operand import check_count
from paraboloid.operators.damping import whole_damping
from paraboloid.operators.linear_operator import LinearOperator
from paraboloid.operators.partition import block_names, spans
from paraboloid.passes.modes import precisely


class Diagonalised(LinearOperator, kind="Diagonalised"):
    """A block-diagonal matrix by its eigenvalues and eigenvectors: every function of it is exact.

    forms   one `Eigenform` for each block
    blocks  the places of each block's parameters in the order of `parameters`; by default one for each parameter
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        forms: Sequence[Eigenform],
        blocks: Sequence[Sequence[int]] | None = None,
    ):
        dtype = common_dtype({form.values.dtype for form in forms})
        self.parameters, self.forms = parameters, [f if f.values.dtype == dtype else f.to(dtype) for f in forms]
        sizes = expected = [p.numel() for p in parameters.values()]
        self.blocks = [[i] for i in range(len(parameters))] if blocks is None else [list(b) for b in blocks]
        if blocks is not None:
            expected = [sum([sizes[i] for i in b]) for b in self.blocks]
        found = [form.size for form in self.forms]
        if expected != found:
            raise ValueError(f"the blocks have the sizes {found}; expected those of {self.names}: {expected}.")

    exact = True

    def _state(self) -> dict[str, Any]:
        return {"blocks": self.blocks, "forms": [form.state() for form in self.forms]}

    @classmethod
    def _of_state(cls, state: dict[str, Any], parameters: Mapping[str, Tensor]) -> Diagonalised:
        return cls(parameters, [Eigenform.of_state(form) for form in state["forms"]], state["blocks"])

    @property
    def dtype(self) -> torch.dtype:
        """That of the eigenvalues: at least float32, which parameters may not be."""
        return self.forms[0].values.dtype

    @cached_property
    def names(self) -> list[str]:
        """What each block is called in errors."""
        return block_names(self.parameters, self.blocks or [])

    @cached_property
    def _at(self) -> list[slice | Tensor]:
        """Where each block lies in a flat vector."""
        return spans(self.parameters, self.blocks or [])

    def map(self, function: Callable[[Tensor], Tensor]) -> Diagonalised:
        """The same function of every eigenvalue."""
        return Diagonalised(self.parameters, [form.map(function) for form in self.forms], self.blocks)

    def plus(self, other: Diagonalised) -> Diagonalised | None:
        """The sum, where every pair of blocks has one basis; else None."""
        if self.blocks != other.blocks:
            first, second = (self, other) if other.is_multiple_of_identity else (other, self)
            if not second.is_multiple_of_identity:
                return None
            shift = second.forms[0].rest
            return first.map(lambda s: s + shift)
        pairs = list(zip(self.forms, other.forms, strict=True))
        if not all(a.shares_basis(b) for a, b in pairs):
            return None
        return Diagonalised(self.parameters, [a.plus(b) for a, b in pairs], self.blocks)

    @property
    def is_multiple_of_identity(self) -> bool:
        rests = {form.rest.item() for form in self.forms}
        return len(rests) == 1 and not any(form.values.numel() for form in self.forms)

    # --- the operator --------------------------------------------------------------------------------------------

    def _product(self, rows: Tensor) -> Tensor:
        result = torch.empty_like(rows)
        for at, form in zip(self._at, self.forms, strict=True):
            result[:, at] = form.product(rows[:, at])
        return result

    def to_dense(self) -> Tensor:
        return dense_of(self.shape[0], self._at, [form.to_dense() for form in self.forms], self)

    def diagonal(self, samples=None, seed=0):
        if samples is not None:
            return super().diagonal(samples, seed)
        result = torch.empty(self.shape[0], dtype=self.dtype, device=self.device)
        for at, form in zip(self._at, self.forms, strict=True):
            result[at] = form.diagonal().to(result)
        return result

    def trace(self, samples=None, seed=0):
        return super().trace(samples, seed) if samples is not None else sum(self.traces().values())

    def traces(self) -> dict[str, float]:
        """The trace of each block, by the parameter's name (several parameters of one block: joined by " + ")."""
        return {name: form.trace().item() for name, form in zip(self._labels, self.forms, strict=True)}

    @property
    def _labels(self) -> list[str]:
        names = list(self.parameters)
        return [" + ".join(names[i] for i in b) for b in self.blocks or []]

    def frobenius_norm(self) -> Tensor:
        return torch.stack([form.frobenius_norm() for form in self.forms]).norm()

    def inverse(self, damping: float = 0.0, split: str | None = None) -> Diagonalised:
        """(A + damping I)^-1, exact.

        Raises ValueError, with the parameter's name, where an eigenvalue + damping is below eps times the largest, and
        for a `split`: eigenvalues, those of EKFAC above all, are no products of those of two factors.
        """
        whole_damping(self, split)
        check_positive(self._named, damping)
        return self.map(lambda s: 1 / (s + damping))

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det(A + damping I); raises as `inverse` does."""
        check_positive(self._named, damping)
        return torch.stack([form.logdet(damping) for form in self.forms]).sum()

    def sqrt(self) -> Diagonalised:
        """The symmetric root A^(1/2) of a positive semi-definite matrix."""
        check_semidefinite(self._named)
        return self.map(lambda s: s.clamp(min=0).sqrt())

    def sqrt_matmul(self, v: Any) -> Any:
        """A^(1/2) v, the symmetric root, for a positive semi-definite A; v in any form that `@` takes."""
        return self.sqrt() @ v

    @property
    def _named(self) -> dict[str, Eigenform]:
        return dict(zip(self.names, self.forms, strict=True))

    def _structured(self, what: str) -> Diagonalised:
        return self

    # --- eigenpairs ----------------------------------------------------------------------------------------------

    def eigsh(self, k, tol=None, max_products=None, seed=0):
        """The k algebraically largest eigenvalues [k], descending, and orthonormal eigenvectors [D, k]; exact."""
        check_count("k", k, most=self.shape[0])
        values, block, place, forms = self._sorted(k)
        vectors = torch.zeros(k, self.shape[0], dtype=self.dtype, device=self.device)
        for b, form in enumerate(forms):
            chosen = (block == b).nonzero().flatten()
            if len(chosen):
                at = self._at[b]
                at = torch.arange(at.start, at.stop, device=self.device) if isinstance(at, slice) else at
                vectors[chosen.unsqueeze(1), at] = form.vectors(place[chosen]).to(vectors)
        return values, vectors.T.contiguous()

    def _sorted(self, k: int) -> tuple[Tensor, Tensor, Tensor, list[Eigenform]]:
        """The k largest eigenvalues, the block and the place within it of each, and the forms that these count in."""
        forms = self.forms
        values = torch.cat([form.values.reshape(-1) for form in forms]).to(self.dtype)
        rests = [form.rest.item() for form in forms if form.left_out]
        if rests and (k > len(values) or values.topk(k).values[-1].item() < max(rests)):
            forms = [form.completed() for form in forms]
            values = torch.cat([form.values.reshape(-1) for form in forms]).to(self.dtype)
        sizes = torch.tensor([form.values.numel() for form in forms], device="cpu")
        values, order = values.sort(descending=True, stable=True)
        order = order[:k]
        ends = sizes.cumsum(0).to(order.device)
        block = torch.searchsorted(ends, order, right=True)
        return values[:k], block, order - (ends - sizes.to(ends))[block], forms

    def top_eigenvalues(self, k: int) -> list[tuple[float, str]]:
        """The k largest eigenvalues with the parameter that each belongs to, descending."""
        values, block, _, _ = self._sorted(check_count("k", k, most=self.shape[0]))
        labels = self._labels
        return [(value, labels[b]) for value, b in zip(values.tolist(), block.tolist(), strict=True)]

    def eigh(self) -> Eigenpairs:
        """All eigenvalues [D], descending, and the orthogonal matrix of the eigenvectors, kept in its structure.

        A = V diag(values) V^T; ``V @ x``, ``V.T @ x`` and ``V.to_dense()`` give what is wanted of it.
        """
        values, block, place, forms = self._sorted(self.shape[0])
        return Eigenpairs(values, Eigenvectors(self._at, forms, block, place, self.shape[0]))


class Eigenpairs(NamedTuple):
    """values [D], descending; vectors [D, D] as an orthogonal matrix with `@`, `.T` and `to_dense()`."""

    values: Tensor
    vectors: Eigenvectors


class Eigenvectors:
    """An orthogonal matrix [D, D] whose columns are the eigenvectors of blocks; known by its products."""

    def __init__(self, at, forms, block, place, size: int, transposed: bool = False):
        self._at, self.forms, self.block, self.place, self.transposed = at, forms, block, place, transposed
        self.shape, self.dtype, self.device = (size, size), forms[0].values.dtype, forms[0].values.device
        sizes = torch.tensor([form.size for form in forms], device=block.device)
        self.order = (sizes.cumsum(0) - sizes)[block] + place  # of the sorted eigenvalues, among those block by block

    @property
    def T(self) -> Eigenvectors:
        return Eigenvectors(self._at, self.forms, self.block, self.place, self.shape[0], not self.transposed)

    @precisely
    def __matmul__(self, v: Tensor) -> Tensor:
        if v.dim() not in (1, 2) or len(v) != self.shape[0]:
            raise ValueError(f"the vector has shape {tuple(v.shape)}; expected [{self.shape[0]}] or "
                             f"[{self.shape[0]}, K].")  # fmt: skip
        rows = v.reshape(len(v), -1).T.to(self.dtype)
        result = torch.empty_like(rows)
        if self.transposed:
            parts = [form.rotated(rows[:, at]).flatten(1) for at, form in zip(self._at, self.forms, strict=True)]
            result = torch.cat(parts, 1)[:, self.order]
        else:
            c = torch.empty_like(rows)
            c[:, self.order] = rows
            pieces = c.split([form.size for form in self.forms], 1)
            for at, form, piece in zip(self._at, self.forms, pieces, strict=True):
                result[:, at] = form.restored(piece.reshape(-1, *form.values.shape))
        return result.T.reshape(v.shape)

    def to_dense(self) -> Tensor:
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """What numbers of these types are kept in together: at least float32."""
    return reduce(torch.promote_types, dtypes, torch.float32)


def dense_of(size: int, at: Sequence[slice | Tensor], matrices: Sequence[Tensor], like: LinearOperator) -> Tensor:
    """A block-diagonal matrix [D, D] from its blocks."""
    result = torch.zeros(size, size, dtype=like.dtype, device=like.device)
    for where, B in zip(at, matrices, strict=True):
        if isinstance(where, slice):
            result[where, where] = B.to(result)
        else:
            result[where.unsqueeze(1), where] = B.to(result)
    return result
