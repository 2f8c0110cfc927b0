"""Kronecker-factored curvature over all parameters: a block left (x) right for each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.kronecker import Decomposed, Kron, check_split
from paraboloid.operators.linear_operator import LinearOperator
from paraboloid.operators.partition import block_names, spans
from paraboloid.operators.structured.diagonalised import Diagonalised, common_dtype, dense_of


class KroneckerFactored(LinearOperator, kind="KroneckerFactored"):
    """A block-diagonal matrix with the block left (x) right for each parameter, from bare factors.

        K = pb.operators.KroneckerFactored(dict(model.named_parameters()), krons)
        step = K.inverse(damping=1e-3) @ gradient

    parameters  by name, in the order of flat vectors
    krons       `Kron` by name, the same names

    Products use the factors.  What needs eigenvalues decomposes the factors once, when it is first asked for; later
    calls, with another damping for instance, reuse that.

    Raises ValueError where names or sizes do not fit the parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor], krons: Mapping[str, Kron]):
        if set(krons) != set(parameters):
            raise ValueError(f"the factors' names are {sorted(krons)}; expected the parameters' {sorted(parameters)}.")
        self.parameters = {name: p.detach() for name, p in parameters.items()}
        dtype = common_dtype(kron.dtype for kron in krons.values())
        self.krons = {name: krons[name].to(dtype) for name in parameters}
        for name, p in parameters.items():
            kron = self.krons[name]
            if kron.size != p.numel():
                raise ValueError(
                    f"parameter {name!r} of shape {tuple(p.shape)} has {p.numel()} elements, but its factors are for "
                    f"{kron.groups} x {kron.sides[0].size} x {kron.sides[1].size}; expected groups x p x q elements."
                )
        self.blocks = [[i] for i in range(len(parameters))]

    exact = True

    @property
    def dtype(self) -> torch.dtype:
        """That of the factors: at least float32, which parameters may not be."""
        return next(iter(self.krons.values())).dtype

    def _state(self) -> dict[str, Any]:
        return {"factors": {k: kron.state() for k, kron in self.krons.items()}}

    @classmethod
    def _of_state(cls, state: dict[str, Any], parameters: Mapping[str, Tensor]) -> KroneckerFactored:
        return cls(parameters, {k: Kron.of_state(factors) for k, factors in state["factors"].items()})

    @cached_property
    def eigenform(self) -> Diagonalised:
        """The same matrix by its eigenvalues and eigenvectors."""
        names = block_names(self.parameters, self.blocks or [])
        known: list[Decomposed] = []
        pairs = zip(names, self.krons.values(), strict=True)
        forms = [kron.eigenform(name, known) for name, kron in pairs]
        return Diagonalised(self.parameters, forms)

    def _structured(self, what: str) -> Diagonalised:
        return self.eigenform

    def _split(self, rows: Tensor) -> list[Tensor]:
        return list(rows.split([p.numel() for p in self.parameters.values()], 1))

    def _product(self, rows: Tensor) -> Tensor:
        pairs = zip(self.krons.values(), self._split(rows), strict=True)
        return torch.cat([kron.product(part) for kron, part in pairs], 1)

    def to_dense(self) -> Tensor:
        at = spans(self.parameters, self.blocks or [])
        return dense_of(self.shape[0], at, [kron.to_dense() for kron in self.krons.values()], self)

    def diagonal(self, samples=None, seed=0):
        if samples is not None:
            return super().diagonal(samples, seed)
        return torch.cat([kron.diagonal() for kron in self.krons.values()]).to(self.dtype)

    def trace(self, samples=None, seed=0):
        return super().trace(samples, seed) if samples is not None else sum(self.traces().values())

    def traces(self) -> dict[str, float]:
        """The trace of each parameter's block."""
        return {name: kron.trace().item() for name, kron in self.krons.items()}

    def frobenius_norm(self) -> Tensor:
        return torch.stack([kron.frobenius_norm() for kron in self.krons.values()]).norm()

    def inverse(self, damping: float = 0.0, split: str | None = None) -> Diagonalised | KroneckerFactored:
        """(A + damping I)^-1, exact by eigendecomposition; or with split="pi" an approximation by two inverses for each
        parameter, (left + pi sqrt(damping) I)^-1 (x) (right + sqrt(damping) / pi I)^-1.  Blocks with one factor alone,
        those of biases, are exact with both.  split="same" damps both factors alike, as other libraries do:
        (left + damping I)^-1 (x) (right + damping I)^-1.

        Raises ValueError, with the parameter's name, where an eigenvalue + damping is below eps times the largest.
        Source of the split: Martens & Grosse 2015, arXiv:1503.05671, section 6.3.
        """
        if check_split(split) is None:
            return self.eigenform.inverse(damping)
        same = split == "same"
        return KroneckerFactored(self.parameters, {
            name: kron.split_inverse(damping, f"parameter {name!r}", same) for name, kron in self.krons.items()
        })  # fmt: skip
