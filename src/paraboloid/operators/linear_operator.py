"""The contract of a curvature: a symmetric linear map on parameter space."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from paraboloid import linalg
from paraboloid.linalg.eigen import dense
from paraboloid.linalg.estimate import Estimate, TensorEstimate, mean_estimate
from paraboloid.linalg.operand import check_count
from paraboloid.linalg.probes import Seed, block_size, blocks, generator_of, signs
from paraboloid.operators import saving
from paraboloid.operators.damping import Damped, whole_damping
from paraboloid.operators.product import Product, as_number, as_scipy
from paraboloid.passes import trees
from paraboloid.passes.modes import precisely

Vector = Tensor | Mapping[str, Tensor]


class LinearOperator:
    """A symmetric matrix [D, D] over the trainable parameters, in the order of `named_parameters`.

    A subclass gives `parameters`, `_product` and what it can do better than by products.  What is said of exactness and
    cost below holds for operators known by their products alone.
    """

    __array_ufunc__ = None  # so that NumPy leaves v @ A to us
    parameters: Mapping[str, Tensor]
    """By name, in order; only shapes, types and devices are looked at."""
    kind: ClassVar[str] = ""
    """What files call it, as given in ``class A(LinearOperator, kind="A")``; empty where it has no state."""
    exact = False
    """Whether its eigenvalues are at hand without products."""
    left_out: float = 0.0
    """What a `tol` left out: the relative trace of the loss's Hessians, over all data."""
    blocks: list[list[int]] | None = None
    """The places of each block's parameters, where the matrix is block-diagonal."""

    def __init_subclass__(cls, kind: str | None = None, **options: Any):
        super().__init_subclass__(**options)
        if kind is not None:
            cls.kind, saving.KINDS[kind] = kind, cls

    @property
    def shape(self) -> tuple[int, int]:
        """(D, D)."""
        size = sum(p.numel() for p in self.parameters.values())
        return size, size

    @property
    def dtype(self) -> torch.dtype:
        """Of the results: the parameters', or what they are kept in together; float32 for half precision."""
        dtypes = [p.dtype for p in self.parameters.values()]
        found = dtypes[0] if len(set(dtypes)) == 1 else _promoted(dtypes)
        return torch.float32 if found in (torch.float16, torch.bfloat16) else found

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.parameters.values())).device

    def _product(self, rows: Tensor) -> Tensor:
        """Products with the K rows of a [K, D] tensor, as rows."""
        raise NotImplementedError

    @precisely
    def __matmul__(self, v: Any) -> Any:
        """The product with a dict by parameter name (entries may carry a trailing axis K), a tensor [D] or [D, K].

        The result has the form of v, and the operator's dtype (in a dict the parameters').  With another operator:
        their `Product`.
        """
        if isinstance(v, LinearOperator | Product):
            factors = v.factors if isinstance(v, Product) else (v,)
            _check_parameters("multiplied", self, factors[0])
            return Product(self, *factors)
        columns = self.columns(v)
        product = self._product(columns.T.contiguous() if columns.dim() == 2 else columns.unsqueeze(0))
        return self.like(product.T if columns.dim() == 2 else product.squeeze(0), v)

    @precisely
    def __rmatmul__(self, v: Any) -> Any:
        """v @ A, of v's form: the matrix is symmetric, so A @ v for a dict or [D], and A times the rows of [K, D]."""
        return self._product(self.rows(v)) if isinstance(v, Tensor) and v.dim() == 2 else self @ v

    def columns(self, v: Vector) -> Tensor:
        """A vector in any accepted form as a flat [D] or [D, K] tensor of the operator's dtype."""
        if isinstance(v, Mapping):
            v = trees.flatten(v, self.parameters)
        if not isinstance(v, Tensor):
            raise ValueError(f"the vector is a {type(v).__name__}; expected a tensor [{self.shape[0]}] or "
                             f"[{self.shape[0]}, K], or a dict by parameter name.")  # fmt: skip
        if v.dim() not in (1, 2) or len(v) != self.shape[0]:
            raise ValueError(f"the vector has shape {tuple(v.shape)}; expected [{self.shape[0]}] or "
                             f"[{self.shape[0]}, K], or a dict by parameter name.")  # fmt: skip
        if v.is_complex():
            raise ValueError(f"the vector has dtype {v.dtype}; expected a real type.")
        if v.device != self.device:
            raise ValueError(f"the vector is on {v.device}; expected {self.device}, where the parameters are.")
        dtype = self.dtype
        return v if v.dtype == dtype and not v.requires_grad else v.detach().to(dtype)

    def like(self, flat: Tensor, v: Vector) -> Any:
        """A flat [D] or [D, K] result in the form of v."""
        if not isinstance(v, Mapping):
            return flat
        return {k: t.to(self.parameters[k].dtype) for k, t in trees.unflatten(flat, self.parameters).items()}

    def rows(self, directions: Tensor) -> Tensor:
        """Check directions [k, D]; in the operator's dtype."""
        if not isinstance(directions, Tensor) or directions.dim() != 2 or directions.shape[1] != self.shape[0]:
            found = tuple(directions.shape) if isinstance(directions, Tensor) else type(directions).__name__
            raise ValueError(
                f"the directions are {found}; expected a tensor [k, {self.shape[0]}], one direction per row."
            )
        return self.columns(directions.T).T

    def quadratic_forms(self, directions: Tensor) -> Tensor:
        """d.A d for each row d of `directions` [k, D], as it is given: [k]."""
        rows = self.rows(directions)
        return (rows * self._product(rows)).sum(1)

    def to_dense(self) -> Tensor:
        """The matrix [D, D], exactly symmetric; D products."""
        return dense(self)

    def diagonal(self, samples: int | None = None, seed: Seed = 0) -> Tensor:
        """The diagonal [D], exact, from D quadratic forms; or with `samples` an estimate from so many products, which
        carries `.standard_error` [D]."""
        if samples is not None:
            return linalg.diagonal(self, samples, seed)
        size, step = self.shape[0], block_size(*self.shape[:1], self.dtype)
        parts = []
        for start in range(0, size, step):
            units = torch.zeros(min(step, size - start), size, dtype=self.dtype, device=self.device)
            units[:, start:].fill_diagonal_(1)
            parts.append(self.quadratic_forms(units))
        return torch.cat(parts)

    def trace(self, samples: int | None = None, seed: Seed = 0) -> float:
        """The trace: exact, at the cost of the diagonal; or with `samples` Hutchinson's estimate from so many quadratic
        forms, an `Estimate` (a float with `.standard_error`)."""
        if samples is None:
            return self.diagonal().sum().item()
        check_count("samples", samples)
        generator = generator_of(seed, self.device)
        size = self.shape[0]
        forms = [self.quadratic_forms(signs((n, size), self, generator)) for n in blocks(samples, size, self.dtype)]
        return mean_estimate(torch.cat(forms))

    @precisely
    def eigsh(
        self, k: int, tol: float | None = None, max_products: int | None = None, seed: Seed = 0
    ) -> tuple[Tensor, Tensor]:
        """The k algebraically largest eigenvalues [k], descending, and orthonormal eigenvectors [D, k].

        Lanczos, or the dense matrix where that is cheaper (k = D is allowed); see `paraboloid.linalg.eigsh`.  Where the
        eigenvalues are at hand it is exact.
        """
        if self.exact:
            return self._structured("eigsh(k)").eigsh(k)
        return linalg.eigsh(self, k, tol, max_products, seed)

    @precisely
    def solve(
        self,
        b: Any,
        damping: float = 0.0,
        tol: float | None = None,
        max_iterations: int | None = None,
        preconditioner: Any = None,
    ) -> Any:
        """x with (A + damping I) x = b by conjugate gradients; b and x in any form that `@` takes.

        tol bounds the relative residual: 1e-10 in float64, 1e-5 in lower precision unless given.  See `linalg.cg`.
        Where the eigenvalues are at hand it is exact, and the last three arguments have no meaning.
        """
        if self.exact:
            return self.inverse(damping) @ b
        columns = self.columns(b)
        tol = (1e-10 if self.dtype == torch.float64 else 1e-5) if tol is None else tol
        return self.like(linalg.cg(Damped(self, damping), columns, tol, max_iterations, preconditioner), b)

    def inverse(self, damping: float = 0.0, split: str | None = None) -> LinearOperator:
        """(A + damping I)^-1 as an operator, for matrices with structure; `split` needs two Kronecker factors."""
        whole_damping(self, split)
        return self._structured("inverse(damping)").inverse(damping)

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det(A + damping I), for matrices with structure."""
        return self._structured("logdet(damping)").logdet(damping)

    def sqrt_matmul(self, v: Any) -> Any:
        """A^(1/2) v with the symmetric root, for matrices with structure."""
        return self._structured("sqrt_matmul(v)").sqrt_matmul(v)

    def eigh(self) -> Any:
        """All eigenvalues [D] and eigenvectors, `Eigenpairs`, for matrices with structure."""
        return self._structured("eigh()").eigh()

    def traces(self) -> dict[str, float]:
        """The trace of each block, by the parameter's name (several parameters of one block: joined by " + ")."""
        return self._structured("traces()").traces()

    def top_eigenvalues(self, k: int) -> list[tuple[float, str]]:
        """The k largest eigenvalues with the parameter (or block) that each belongs to, descending."""
        return self._structured("top_eigenvalues(k)").top_eigenvalues(k)

    def frobenius_norm(self) -> Tensor:
        """The square root of the sum of squared entries; exact, at the cost of `to_dense`."""
        return self.to_dense().norm()

    def _structured(self, what: str) -> Any:
        """The matrix by its eigenvalues, a `Diagonalised`; raises NotImplementedError for one that is known by its
        products alone."""
        raise NotImplementedError(
            f"{type(self).__name__} is known by its products alone, so it has no {what}; expected an operator with "
            "structure, such as a block-diagonal or Kronecker-factored one. Use solve(b, damping=...) for a linear "
            "system, or to_dense()."
        )

    def state_dict(self) -> dict[str, Any]:
        """The operator as a dictionary of tensors, numbers and strings, which shares the operator's tensors; see
        `paraboloid.operators.load`.  NotImplementedError for one that is known by its products alone."""
        shapes = {k: list(p.shape) for k, p in self.parameters.items()}
        return {"kind": self.kind, "version": saving.VERSION, "parameters": shapes, **self._state()}

    def _state(self) -> dict[str, Any]:
        """What `_of_state(state, parameters)` makes the operator of; a class with a `kind` has both."""
        raise NotImplementedError(
            f"{type(self).__name__} is known by its products alone, so it has no state; expected an operator with "
            "structure. Save its dense matrix (to_dense()), or eigenpairs as pb.operators.LowRank.from_operator(A, k)."
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the operator that `state_dict` described; raises ValueError for one of another kind or parameters."""
        found = saving.load(state, self.parameters)
        if type(found) is not type(self):
            raise ValueError(f"the state is that of a {type(found).__name__}; expected one of a {type(self).__name__}.")
        self.__dict__.clear()  # what was cached too
        self.__dict__.update(found.__dict__)

    def to_scipy(self):
        """The same operator as a `scipy.sparse.linalg.LinearOperator`, float64 in and out, on the CPU's side."""
        return as_scipy(self, self)

    def __add__(self, other: Any) -> LinearOperator:
        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: Any) -> LinearOperator:
        return Sum(self, -other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, scale: Any) -> LinearOperator:
        return NotImplemented if (number := as_number(scale)) is None else Scaled(self, number)

    __rmul__ = __mul__

    def __truediv__(self, scale: Any) -> LinearOperator:
        if (number := as_number(scale)) is None:
            return NotImplemented
        if number == 0:
            raise ValueError(f"the operator is divided by {scale}; expected a number other than 0.")
        return Scaled(self, 1 / number)

    def __neg__(self) -> LinearOperator:
        return Scaled(self, -1.0)

    def __repr__(self) -> str:
        size = self.shape[0]
        return f"{type(self).__name__}([{size}, {size}], {self.dtype}, {self.device})"


class Scaled(LinearOperator, kind="Scaled"):
    """scale * A."""

    def __init__(self, operator: LinearOperator, scale: float):
        self.operator, self.scale, self.parameters = operator, scale, operator.parameters
        self.exact = operator.exact

    def _state(self) -> dict[str, Any]:
        return {"scale": self.scale, "operator": self.operator.state_dict()}

    @classmethod
    def _of_state(cls, state: dict[str, Any], parameters: Mapping[str, Tensor]) -> Scaled:
        return cls(saving.load(state["operator"], parameters), state["scale"])

    @property
    def dtype(self) -> torch.dtype:
        return self.operator.dtype

    def _product(self, rows: Tensor) -> Tensor:
        return self.scale * self.operator._product(rows)

    def quadratic_forms(self, directions: Tensor) -> Tensor:
        return self.scale * self.operator.quadratic_forms(directions)

    def to_dense(self) -> Tensor:
        return self.scale * self.operator.to_dense()

    def diagonal(self, samples=None, seed=0):
        return super().diagonal(samples, seed) if samples is not None else self.scale * self.operator.diagonal()

    def frobenius_norm(self) -> Tensor:
        return abs(self.scale) * self.operator.frobenius_norm()

    def _structured(self, what: str) -> Any:
        return self.operator._structured(what).map(lambda s: self.scale * s)


class Sum(LinearOperator, kind="Sum"):
    """A + B: over the same parameters."""

    def __init__(self, first: LinearOperator, second: LinearOperator):
        _check_parameters("summed", first, second)
        self.terms, self.parameters = (first, second), first.parameters

    def _state(self) -> dict[str, Any]:
        return {"terms": [term.state_dict() for term in self.terms]}

    @classmethod
    def _of_state(cls, state: dict[str, Any], parameters: Mapping[str, Tensor]) -> Sum:
        return cls(*(saving.load(term, parameters) for term in state["terms"]))

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(*(A.dtype for A in self.terms))

    @property
    def exact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(A.exact for A in self.terms) and self._joint is not None

    @cached_property
    def _joint(self) -> Any:
        """The summands' eigenvalues added up, where they share their eigenvectors; else None."""
        first, second = (A._structured("eigenvalues") for A in self.terms)
        return first.plus(second)

    def _product(self, rows: Tensor) -> Tensor:
        return self.terms[0]._product(rows) + self.terms[1]._product(rows)

    def quadratic_forms(self, directions: Tensor) -> Tensor:
        return self.terms[0].quadratic_forms(directions) + self.terms[1].quadratic_forms(directions)

    def to_dense(self) -> Tensor:
        return self.terms[0].to_dense() + self.terms[1].to_dense()

    def diagonal(self, samples=None, seed=0):
        if samples is not None:
            return super().diagonal(samples, seed)
        return self.terms[0].diagonal() + self.terms[1].diagonal()

    def frobenius_norm(self) -> Tensor:
        return self._joint.frobenius_norm() if self.exact else super().frobenius_norm()

    def _structured(self, what: str) -> Any:
        """The eigenvalues added up, where the summands have one eigenbasis; raises NotImplementedError otherwise."""
        for A in self.terms:
            if not A.exact:
                A._structured(what)  # raises where there is none
        if self._joint is None:
            kinds = " and ".join(type(A).__name__ for A in self.terms)
            raise NotImplementedError(
                f"the sum of {kinds} has no {what}: the summands have different eigenvectors; expected summands that "
                "share them, such as A + c * Identity, or operators made with one eigenbasis. Use "
                "solve(b, damping=...), which knows the products alone."
            )
        return self._joint


def _check_parameters(how: str, first: LinearOperator, second: LinearOperator) -> None:
    shapes = [{k: tuple(p.shape) for k, p in A.parameters.items()} for A in (first, second)]
    if list(shapes[0].items()) != list(shapes[1].items()):
        raise ValueError(f"the {how} operators have the parameters {shapes[0]} and {shapes[1]}; expected the same "
                         "names and shapes in the same order.")  # fmt: skip


def _promoted(dtypes: list[torch.dtype]) -> torch.dtype:
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


__all__ = ["Estimate", "LinearOperator", "TensorEstimate", "Vector"]
