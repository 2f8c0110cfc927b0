"""Kronecker-factored curvature over all parameters: a block left (x) right for each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.kron import Kron
from paraboloid.linalg.kronecker_product import Decomposed, KroneckerProduct, Side
from paraboloid.operators.linear_operator import LinearOperator
from paraboloid.operators.partition import block_names
from paraboloid.operators.structured.diagonalised import Diagonalised, common_dtype, dense_of


class KroneckerFactored(LinearOperator, kind="KroneckerFactored"):
    """A block-diagonal matrix with the block left (x) right for each parameter, from bare factors.

        K = pb.operators.KroneckerFactored(dict(model.named_parameters()), krons)
        step = K.inverse(damping=1e-3) @ gradient

    parameters  by name, in the order of flat vectors
    krons       `Kron` (or `KroneckerProduct`) by name, the same names

    Products use the factors.  What needs eigenvalues decomposes the factors once, when it is first asked for; later
    calls, with another damping for instance, reuse that.

    Raises ValueError where names or sizes do not fit the parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor], krons: Mapping[str, Kron | KroneckerProduct]):
        if set(krons) != set(parameters):
            raise ValueError(f"the factors' names are {sorted(krons)}; expected the parameters' {sorted(parameters)}.")
        self.parameters = {name: p.detach() for name, p in parameters.items()}
        found = {name: krons[name] for name in parameters}
        products = {name: k.block if isinstance(k, Kron) else k for name, k in found.items()}
        dtype = common_dtype(product.left.data.dtype for product in products.values())
        self.products = {name: product.to(dtype) for name, product in products.items()}
        for name, p in parameters.items():
            product = self.products[name]
            if product.size != p.numel():
                raise ValueError(
                    f"parameter {name!r} of shape {tuple(p.shape)} has {p.numel()} elements, but its factors are for "
                    f"{product.groups} x {product.left.size} x {product.right.size}; expected groups x p x q elements."
                )
        self.blocks = [[i] for i in range(len(parameters))]

    exact = True

    @property
    def dtype(self) -> torch.dtype:
        """That of the factors: at least float32, which parameters may not be."""
        return next(iter(self.products.values())).left.data.dtype

    def _state(self) -> dict[str, Any]:
        return {"factors": {k: [[s.kind, s.data] for s in (p.left, p.right)] for k, p in self.products.items()}}

    @classmethod
    def _of_state(cls, state: dict[str, Any], parameters: Mapping[str, Tensor]) -> KroneckerFactored:
        factors = {k: [Side(kind, data) for kind, data in sides] for k, sides in state["factors"].items()}
        return cls(parameters, {k: KroneckerProduct(*sides) for k, sides in factors.items()})

    @cached_property
    def krons(self) -> dict[str, Kron]:
        """The factors by parameter name, as dense tensors."""
        return {name: dense_kron(product) for name, product in self.products.items()}

    @cached_property
    def eigenform(self) -> Diagonalised:
        """The same matrix by its eigenvalues and eigenvectors."""
        names = block_names(self.parameters, self.blocks or [])
        known: list[Decomposed] = []
        pairs = zip(names, self.products.values(), strict=True)
        forms = [product.eigenform(name, known) for name, product in pairs]
        return Diagonalised(self.parameters, forms)

    def _structured(self, what: str) -> Diagonalised:
        return self.eigenform

    def _split(self, rows: Tensor) -> list[Tensor]:
        return list(rows.split([p.numel() for p in self.parameters.values()], 1))

    def _product(self, rows: Tensor) -> Tensor:
        pairs = zip(self.products.values(), self._split(rows), strict=True)
        return torch.cat([product.product(part) for product, part in pairs], 1)

    def to_dense(self) -> Tensor:
        ends, at = 0, []
        for p in self.parameters.values():
            at.append(slice(ends, ends + p.numel()))
            ends += p.numel()
        return dense_of(self.shape[0], at, [product.to_dense() for product in self.products.values()], self)

    def diagonal(self, samples=None, seed=0):
        if samples is not None:
            return super().diagonal(samples, seed)
        return torch.cat([product.diagonal() for product in self.products.values()]).to(self.dtype)

    def trace(self, samples=None, seed=0):
        return super().trace(samples, seed) if samples is not None else sum(self.traces().values())

    def traces(self) -> dict[str, float]:
        """The trace of each parameter's block."""
        return {name: product.trace().item() for name, product in self.products.items()}

    def frobenius_norm(self) -> Tensor:
        return torch.stack([product.frobenius_norm() for product in self.products.values()]).norm()

    def inverse(self, damping: float = 0.0, split: str | None = None) -> Diagonalised | KroneckerFactored:
        """(A + damping I)^-1, exact by eigendecomposition; or with split="pi" an approximation by two inverses for each
        parameter, (left + pi sqrt(damping) I)^-1 (x) (right + sqrt(damping) / pi I)^-1.

        Raises ValueError, with the parameter's name, where an eigenvalue + damping is below eps times the largest.
        Source of the split: Martens & Grosse 2015, arXiv:1503.05671, section 6.3.
        """
        if split not in (None, "pi"):
            raise ValueError(f"split is {split!r}; expected None (exact) or 'pi'.")
        if split is None:
            return self.eigenform.inverse(damping)
        return KroneckerFactored(self.parameters, {
            name: product.split_inverse(damping, f"parameter {name!r}") for name, product in self.products.items()
        })  # fmt: skip


def dense_kron(product: KroneckerProduct) -> Kron:
    """The block's factors as tensors: a diagonal stays one-dimensional."""
    left, right = (s.data if s.kind == "diagonal" else s.dense() for s in (product.left, product.right))
    return Kron(left, right, product.groups) if product.groups > 1 else Kron(left[0], right[0])
